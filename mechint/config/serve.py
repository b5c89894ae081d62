"""Settings of `mechint serve`. Secrets and addresses with passwords come from the environment only."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from mechint.config.base import Config, require


@dataclass(frozen=True)
class ServeConfig(Config):
    """Share SAEs: an HTTP API with progress over WebSocket, and the workers that download, convert, import and upload.

    Nothing has to be installed or started beside it: records are in SQLite, jobs in a folder. MECHINT_DATABASE_URL
    (postgresql://...) and MECHINT_BROKER_URL (redis://...) name servers for both; workers on other machines are then
    started with `celery -A mechint.server.celery_app worker -Q sae`. MECHINT_API_KEY is needed to listen elsewhere than
    on this machine. docs/service.md lists all variables.
    """

    host: str | None = None
    """Address to listen on; 127.0.0.1 if not given. Others can reach any other address: it needs MECHINT_API_KEY."""
    port: int | None = None
    """8000 if not given; 0 for any free one."""
    data_dir: Path | None = None
    """Folder of the library and its records; server-data if not given."""
    runs_root: Path | None = None
    """Folder of the run directories that can be imported; runs if not given."""
    import_root: Annotated[tuple[Path, ...], arg(aliases=["--import-roots"])] = ()
    """Folders from which files may be imported; none if not given."""
    workers: int | None = None
    """Jobs that run at once, each in a process of its own; 1 if not given, 0 with a MECHINT_BROKER_URL."""

    def __post_init__(self) -> None:
        require(self.port is None or 0 <= self.port <= 65535, f"--port must be from 0 to 65535, got {self.port}")
        require(self.workers is None or 0 <= self.workers <= 64, f"--workers must be from 0 to 64, got {self.workers}")
