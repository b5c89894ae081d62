"""Alembic migrations; `mechint.server.db.upgrade` runs them."""
