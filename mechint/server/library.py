"""What the routes call: read the library, and put work into it. Nothing here waits for the work itself.

Reading takes a session (`with service.db.read() as session`); what changes something takes the service, commits by
itself, and wakes a worker afterwards. All raise `mechint.server.errors.ServiceError`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from mechint.server.db import Database
from mechint.server.models import SAE, Job
from mechint.server.settings import Settings


@dataclass(frozen=True)
class Service:
    """One a process."""

    settings: Settings
    db: Database


class Page(NamedTuple):
    items: list[SAE]
    total: int


class Deleted(NamedTuple):
    deleted_ids: list[str]
    failed_ids: list[str]
    errors: dict[str, str]  # id -> why


class Imported(NamedTuple):
    training_id: str
    saes: list[SAE]


def open_service(settings: Settings) -> Service:
    """Open the database (migrating it), and sweep what a crash left behind."""
    raise NotImplementedError


def list_saes(
    session: Session,
    *,
    skip: int = 0,
    limit: int = 50,
    search: str | None = None,
    source: str | None = None,
    status: str | None = None,
    model_name: str | None = None,
    sort_by: str = "created_at",
    order: str = "desc",
) -> Page:
    """A page of the library (deleted ones never). 400 `bad_request` for an unknown source, status, sort_by or order."""
    raise NotImplementedError


def get_sae(session: Session, sae_id: str) -> SAE:
    """404 `sae_not_found`, also for a deleted one."""
    raise NotImplementedError


def get_job(session: Session, job_id: str) -> Job:
    """404 `job_not_found`."""
    raise NotImplementedError


def list_jobs(session: Session, *, sae_id: str | None = None, live: bool = False, limit: int = 100) -> list[Job]:
    """Newest first."""
    raise NotImplementedError


def create_download(
    service: Service,
    *,
    repo_id: str,
    filepath: str,
    name: str | None = None,
    description: str | None = None,
    revision: str | None = None,
    access_token: str | None = None,
    model_name: str | None = None,
    model_id: str | None = None,
) -> tuple[SAE, Job]:
    """A pending SAE and its queued job. 400 for a path that leads out of the repository. Asks the Hub nothing."""
    raise NotImplementedError


def create_upload(
    service: Service,
    *,
    sae_id: str,
    repo_id: str,
    filepath: str,
    access_token: str | None = None,
    create_repo: bool = False,
    private: bool = False,
    commit_message: str = "Upload SAE",
) -> Job:
    """A queued upload. 404; 409 `not_ready`; 400 for a path that leads out; 403 without any token to use."""
    raise NotImplementedError


def available_training(service: Service, training_id: str) -> dict[str, Any]:
    """GET /training/{id}/available: training_id, available_saes, imported_saes, total_count. 404 `training_not_found`."""
    raise NotImplementedError


def create_import_training(
    service: Service,
    *,
    training_id: str,
    name: str | None = None,
    description: str | None = None,
    import_all: bool = True,
    layers: Sequence[int] | None = None,
    hook_types: Sequence[str] | None = None,
) -> Imported:
    """A pending SAE and a queued job for each SAE of the run or sweep that is chosen and not imported yet."""
    raise NotImplementedError


def create_import_file(
    service: Service,
    *,
    file_path: str,
    name: str,
    description: str | None = None,
    format: str = "community_standard",
    model_name: str | None = None,
    layer: int | None = None,
) -> tuple[SAE, Job]:
    """A pending SAE and its queued job. `format` may be `saelens`. 400 `file_not_found` outside the import roots."""
    raise NotImplementedError


def delete_sae(service: Service, sae_id: str, *, delete_files: bool = True) -> None:
    """Take it out of the library, cancel its jobs, remove its files. 404."""
    raise NotImplementedError


def delete_saes(service: Service, sae_ids: Sequence[str], *, delete_files: bool = True) -> Deleted:
    raise NotImplementedError


def cancel(service: Service, *, job_id: str | None = None, sae_id: str | None = None) -> list[Job]:
    """Cancel a job, or the live jobs of an SAE: a waiting one at once, a running one at its next chunk of bytes. 404;
    409 `conflict` if nothing is live."""
    raise NotImplementedError


def retry(service: Service, sae_id: str, *, access_token: str | None = None) -> Job:
    """Queue the last job of an SAE in error again, from the beginning."""
    raise NotImplementedError


def wait_for(service: Service, job_id: str, seconds: float) -> Job:
    """The job once it has ended, or as it is after `seconds`; for clients that want an upload's answer in place."""
    raise NotImplementedError
