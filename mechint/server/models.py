"""The service's tables. A row of `jobs` says what is to be done and how far it is; the broker only wakes workers.

`revision` counts changes of jobs: each change takes the next number in its own transaction, whose row lock orders the
commits, so a reader who has seen number n never meets a smaller one later.
"""

import datetime
import secrets
from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, DateTime, Float, ForeignKey, Index, Integer, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

SOURCES = ("huggingface", "local", "trained")
# uploading is the status of an upload's events; the SAE itself stays ready meanwhile.
STATUSES = ("pending", "downloading", "converting", "ready", "error", "deleted")
FORMATS = ("community_standard", "gemma_scope", "mistudio", "custom")
KINDS = ("download", "upload", "publish", "import_training", "import_file")
LIVE = ("queued", "running")


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def new_id(prefix: str) -> str:
    """`sae_` or `job_` and 12 hex digits."""
    return f"{prefix}_{secrets.token_hex(6)}"


class UtcTime(TypeDecorator[datetime.datetime]):
    """A time in UTC that stays aware on SQLite, which keeps no zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime.datetime | None, dialect: Any) -> datetime.datetime | None:
        return value.astimezone(datetime.UTC) if value is not None else None

    def process_result_value(self, value: datetime.datetime | None, dialect: Any) -> datetime.datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=datetime.UTC) if value.tzinfo is None else value.astimezone(datetime.UTC)


class Base(DeclarativeBase):
    """The tables' metadata."""


class SharedSAE(Base):
    """An SAE of the library. Its files lie in `<data>/saes/<id>/` once it is ready, and only then."""

    __tablename__ = "saes"
    __table_args__ = (Index("ix_saes_status_created", "status", "created_at"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("sae"))
    name: Mapped[str] = mapped_column(String(255))
    description: Mapped[str | None] = mapped_column(Text)
    source: Mapped[str] = mapped_column(String(16))
    status: Mapped[str] = mapped_column(String(16), default="pending")
    hf_repo_id: Mapped[str | None] = mapped_column(String(500))
    hf_filepath: Mapped[str | None] = mapped_column(String(1000))
    hf_revision: Mapped[str | None] = mapped_column(String(255))
    training_id: Mapped[str | None] = mapped_column(String(500), index=True)
    model_name: Mapped[str | None] = mapped_column(String(255), index=True)
    model_id: Mapped[str | None] = mapped_column(String(255))
    layer: Mapped[int | None] = mapped_column(Integer)
    hook_type: Mapped[str | None] = mapped_column(String(32))  # residual, mlp, attention
    hook_name: Mapped[str | None] = mapped_column(String(255))
    n_features: Mapped[int | None] = mapped_column(Integer)
    d_model: Mapped[int | None] = mapped_column(Integer)
    architecture: Mapped[str | None] = mapped_column(String(64))
    format: Mapped[str | None] = mapped_column(String(32))
    local_path: Mapped[str | None] = mapped_column(String(1000))  # relative to the data folder: saes/<id>
    file_size_bytes: Mapped[int | None] = mapped_column(BigInteger)
    progress: Mapped[float] = mapped_column(Float, default=0.0)
    error_message: Mapped[str | None] = mapped_column(Text)
    sae_metadata: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    created_at: Mapped[datetime.datetime] = mapped_column(UtcTime, default=utc_now, index=True)
    updated_at: Mapped[datetime.datetime] = mapped_column(UtcTime, default=utc_now, onupdate=utc_now)
    downloaded_at: Mapped[datetime.datetime | None] = mapped_column(UtcTime)


class Job(Base):
    """One piece of work. `params` holds no token; `token_cipher` is blanked when the job ends."""

    __tablename__ = "jobs"
    __table_args__ = (Index("ix_jobs_state_lease", "state", "lease_until"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True, default=lambda: new_id("job"))
    kind: Mapped[str] = mapped_column(String(24))
    sae_id: Mapped[str] = mapped_column(ForeignKey("saes.id"), index=True)
    state: Mapped[str] = mapped_column(String(16), default="queued")
    stage: Mapped[str] = mapped_column(String(16), default="queued")
    progress: Mapped[float] = mapped_column(Float, default=0.0)  # 0 to 100
    bytes_done: Mapped[int] = mapped_column(BigInteger, default=0)
    bytes_total: Mapped[int | None] = mapped_column(BigInteger)
    message: Mapped[str] = mapped_column(Text, default="Queued")
    error: Mapped[str | None] = mapped_column(Text)
    error_code: Mapped[str | None] = mapped_column(String(64))
    params: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON)  # of an upload: url, commit_hash
    token_cipher: Mapped[str | None] = mapped_column(Text)
    token_until: Mapped[float | None] = mapped_column(Float)  # seconds since 1970, as the three times below
    worker_id: Mapped[str | None] = mapped_column(String(255))
    lease_until: Mapped[float | None] = mapped_column(Float)
    not_before: Mapped[float] = mapped_column(Float, default=0.0)
    woken_at: Mapped[float] = mapped_column(Float, default=0.0)  # when a message was last sent for it
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    seq: Mapped[int] = mapped_column(BigInteger, default=0, index=True)
    created_at: Mapped[datetime.datetime] = mapped_column(UtcTime, default=utc_now)
    started_at: Mapped[datetime.datetime | None] = mapped_column(UtcTime)
    finished_at: Mapped[datetime.datetime | None] = mapped_column(UtcTime)
    updated_at: Mapped[datetime.datetime] = mapped_column(UtcTime, default=utc_now, onupdate=utc_now)


class Revision(Base):
    """One row: the number of the last change of any job."""

    __tablename__ = "revision"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    value: Mapped[int] = mapped_column(BigInteger, default=0)
