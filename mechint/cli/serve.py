"""`mechint serve`: the sharing service with its workers."""

import importlib.util
from collections.abc import Sequence

from mechint.cli.flags import command, parse
from mechint.config.serve import ServeConfig
from mechint.errors import MechintError

# What only the extra brings; their own needs come with them.
NEEDED = ("fastapi", "uvicorn", "websockets", "sqlalchemy", "alembic", "celery", "cryptography", "jinja2")


@command
def main(argv: Sequence[str]) -> int:
    config = parse(ServeConfig, argv, prog="mechint serve")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MechintError(f"{', '.join(missing)} missing: pip install 'mechint[server]'")
    from mechint.server.embedded import serve, settings_of

    return serve(settings_of(config), config.workers)
