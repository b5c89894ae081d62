"""What a server or a worker is told, once, from flags and the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mechint.errors import MechintError

LOOPBACK = ("127.0.0.1", "::1", "localhost")
GIB = 1 << 30


@dataclass(frozen=True)
class Settings:
    """Where the service keeps its things, and what it allows. `environment()` hands it to a worker process.

    Attributes:
        data_dir: folder of the database, the library, the staging area and the embedded broker.
        database_url: of SQLAlchemy; SQLite in `data_dir` if empty.
        broker_url: of Celery; files in `data_dir` if empty.
        api_key: what clients must send; needed to listen elsewhere than on the loopback address.
        import_roots: folders that POST /import/file may read.
        runs_root: folder of run directories for POST /import/training.
        max_upload_bytes: largest body of a request.
        max_sae_bytes: largest sum of the files of an SAE that is downloaded or imported.
        secret_key: encrypts tokens of waiting jobs; `secret.key` in `data_dir` if empty.
        share_hub_token: whether requests without a token use the server's own (HF_TOKEN or `hf auth login`); None:
            only on the loopback address, where the client and the server are one user.
        lease_seconds: a worker that has not been heard of for so long has lost its job.
        max_attempts: how often a job is begun before it becomes an error.
    """

    data_dir: Path = Path("server-data")
    database_url: str = ""
    broker_url: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    import_roots: tuple[Path, ...] = ()
    runs_root: Path = Path("runs")
    max_upload_bytes: int = 1 << 20
    max_sae_bytes: int = 64 * GIB
    secret_key: str | None = field(default=None, repr=False)
    share_hub_token: bool | None = None
    lease_seconds: float = 60.0
    max_attempts: int = 5
    allowed_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # workers have other current folders
        object.__setattr__(self, "data_dir", Path(self.data_dir).absolute())
        object.__setattr__(self, "runs_root", Path(self.runs_root).absolute())
        object.__setattr__(self, "import_roots", tuple(Path(root).absolute() for root in self.import_roots))
        if not 0 <= self.port <= 65535:
            raise MechintError(f"--port must be from 0 to 65535, got {self.port}")
        for name in ("max_upload_bytes", "max_sae_bytes", "lease_seconds", "max_attempts"):
            if getattr(self, name) <= 0:
                raise MechintError(f"{name} must be above 0, got {getattr(self, name)}")

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir / 'mechint.db'}"

    @property
    def broker(self) -> str:
        return self.broker_url or "filesystem://"

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def embedded(self) -> bool:
        """Whether the broker is the folder in `data_dir`, which workers of this machine share."""
        return self.broker.startswith("filesystem://")

    @property
    def uses_server_token(self) -> bool:
        return self.is_loopback if self.share_hub_token is None else self.share_hub_token

    saes_dir = property(lambda self: self.data_dir / "saes")
    staging_dir = property(lambda self: self.data_dir / "staging")
    trash_dir = property(lambda self: self.data_dir / "trash")
    broker_dir = property(lambda self: self.data_dir / "broker")

    def environment(self) -> dict[str, str]:
        """The variables from which `settings_from` makes the same settings in another process."""
        found = {
            "MECHINT_DATA_DIR": str(self.data_dir),
            "MECHINT_DATABASE_URL": self.database_url,
            "MECHINT_BROKER_URL": self.broker_url,
            "MECHINT_HOST": self.host,
            "MECHINT_PORT": str(self.port),
            "MECHINT_API_KEY": self.api_key or "",
            "MECHINT_IMPORT_ROOTS": os.pathsep.join(map(str, self.import_roots)),
            "MECHINT_RUNS_ROOT": str(self.runs_root),
            "MECHINT_MAX_UPLOAD_BYTES": str(self.max_upload_bytes),
            "MECHINT_MAX_SAE_BYTES": str(self.max_sae_bytes),
            "MECHINT_SECRET_KEY": self.secret_key or "",
            "MECHINT_SHARE_HUB_TOKEN": "" if self.share_hub_token is None else str(int(self.share_hub_token)),
            "MECHINT_LEASE_SECONDS": str(self.lease_seconds),
            "MECHINT_MAX_ATTEMPTS": str(self.max_attempts),
            "MECHINT_ALLOWED_HOSTS": ",".join(self.allowed_hosts),
        }
        return {name: value for name, value in found.items() if value}


def settings_from(environment: Mapping[str, str] | None = None) -> Settings:
    """The settings that MECHINT_* variables give; what they leave out is the default.

    Raises:
        MechintError: a value of the wrong kind.
    """
    env = os.environ if environment is None else environment

    def text(name: str) -> str:
        return env.get(f"MECHINT_{name}", "").strip()

    def number(name: str, default: int | float) -> float:
        try:
            return float(text(name) or default)
        except ValueError:
            raise MechintError(f"MECHINT_{name} should be a number, found {text(name)!r}") from None

    share = text("SHARE_HUB_TOKEN").lower()
    if share not in ("", "0", "1", "false", "true"):
        raise MechintError(f"MECHINT_SHARE_HUB_TOKEN should be 0 or 1, found {share!r}")
    default = Settings()
    return Settings(
        data_dir=Path(text("DATA_DIR") or default.data_dir),
        database_url=text("DATABASE_URL"),
        broker_url=text("BROKER_URL"),
        host=text("HOST") or default.host,
        port=int(number("PORT", default.port)),
        api_key=text("API_KEY") or None,
        import_roots=tuple(Path(root) for root in text("IMPORT_ROOTS").split(os.pathsep) if root),
        runs_root=Path(text("RUNS_ROOT") or default.runs_root),
        max_upload_bytes=int(number("MAX_UPLOAD_BYTES", default.max_upload_bytes)),
        max_sae_bytes=int(number("MAX_SAE_BYTES", default.max_sae_bytes)),
        secret_key=text("SECRET_KEY") or None,
        share_hub_token=None if not share else share in ("1", "true"),
        lease_seconds=number("LEASE_SECONDS", default.lease_seconds),
        max_attempts=int(number("MAX_ATTEMPTS", default.max_attempts)),
        allowed_hosts=tuple(host.strip() for host in text("ALLOWED_HOSTS").split(",") if host.strip()),
    )
