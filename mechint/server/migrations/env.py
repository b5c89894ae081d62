"""What Alembic runs: the migrations on the connection that `mechint.server.db.upgrade` hands over."""

from alembic import context

from mechint.server.models import Base


def run() -> None:
    connection = context.config.attributes.get("connection")
    if connection is None:
        from mechint.server.db import make_engine
        from mechint.server.settings import settings_from

        connection = make_engine(settings_from().database).connect().execution_options(mechint_writes=True)
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    with context.begin_transaction():
        context.run_migrations()


run()
