"""What the routes call: read the library, and put work into it. Nothing here waits for the work itself.

Reading takes a session (`with service.db.read() as session`); what changes something takes the service, commits by
itself, and wakes a worker afterwards. All raise `mechint.server.errors.ServiceError`.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from mechint.errors import MechintError
from mechint.huggingface.client import check_repo_id
from mechint.server import storage, tokens
from mechint.server.db import Database, next_seq, open_database
from mechint.server.errors import (
    ServiceError,
    bad_request,
    conflict,
    job_not_found,
    not_ready,
    sae_not_found,
)
from mechint.server.importing import Trained, trained
from mechint.server.jobs import DOWNLOADS, Wake, cancelled, locked, reap, touch, wake
from mechint.server.models import FORMATS, LIVE, SOURCES, STATUSES, Job, SharedSAE
from mechint.server.settings import Settings
from mechint.server.storage import relative_name

log = logging.getLogger(__name__)

SORTS = ("created_at", "updated_at", "downloaded_at", "name", "status", "source", "model_name", "layer")
SORTS += ("n_features", "d_model", "file_size_bytes")


@dataclass(frozen=True)
class Service:
    """One a process: what it was told, its database, and how it wakes workers."""

    settings: Settings
    db: Database
    send: Wake


class Page(NamedTuple):
    items: list[SharedSAE]
    total: int


class Deleted(NamedTuple):
    deleted_ids: list[str]
    failed_ids: list[str]
    errors: dict[str, str]  # id -> why


class Imported(NamedTuple):
    training_id: str
    saes: list[SharedSAE]


def open_service(settings: Settings) -> Service:
    """Open the database (migrating it), sweep what a crash left behind, and put its jobs back.

    Raises:
        MechintError: settings that cannot be used.
    """
    from mechint.server.broker import make_app, sender

    service = Service(settings, open_database(settings), sender(make_app(settings)))
    tokens.hide(settings, "a key that cannot be used is found now")
    storage.sweep(settings, service.db)
    reap(settings, service.db, service.send)
    return service


# --- reading ----------------------------------------------------------------------------------------------------------


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
    """A page of the library (deleted ones never). `bad_request` for an unknown source, status, sort_by or order."""
    for what, value, known in (
        ("source", source, SOURCES),
        ("status", status, tuple(name for name in STATUSES if name != "deleted")),
        ("sort_by", sort_by, SORTS),
        ("order", order, ("asc", "desc")),
    ):
        if value is not None and value not in known:
            raise bad_request(f"unknown {what} {value[:60]!r}", f"use one of {', '.join(known)}")
    chosen: Select[Any] = select(SharedSAE).where(SharedSAE.status != "deleted")
    if search:
        like = "%" + search.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
        columns = (
            SharedSAE.name,
            SharedSAE.description,
            SharedSAE.hf_repo_id,
            SharedSAE.hf_filepath,
            SharedSAE.model_name,
            SharedSAE.training_id,
            SharedSAE.id,
        )
        chosen = chosen.where(or_(*(column.ilike(like, escape="\\") for column in columns)))
    for column, value in ((SharedSAE.source, source), (SharedSAE.status, status), (SharedSAE.model_name, model_name)):
        if value is not None:
            chosen = chosen.where(column == value)
    total = session.scalar(select(func.count()).select_from(chosen.subquery())) or 0
    column = getattr(SharedSAE, sort_by)
    ordered = chosen.order_by(column.desc() if order == "desc" else column.asc(), SharedSAE.id)
    return Page(list(session.scalars(ordered.offset(skip).limit(limit))), total)


def get_sae(session: Session, sae_id: str) -> SharedSAE:
    """404 `sae_not_found`, also for a deleted one."""
    sae = session.get(SharedSAE, sae_id)
    if sae is None or sae.status == "deleted":
        raise sae_not_found(sae_id[:60])
    return sae


def get_job(session: Session, job_id: str) -> Job:
    """404 `job_not_found`."""
    job = session.get(Job, job_id)
    if job is None:
        raise job_not_found(job_id[:60])
    return job


def list_jobs(session: Session, *, sae_id: str | None = None, live: bool = False, limit: int = 100) -> list[Job]:
    """Newest first."""
    chosen = select(Job)
    if sae_id is not None:
        chosen = chosen.where(Job.sae_id == sae_id)
    if live:
        chosen = chosen.where(Job.state.in_(LIVE))
    return list(session.scalars(chosen.order_by(Job.created_at.desc(), Job.id).limit(limit)))


# --- putting work into it ---------------------------------------------------------------------------------------------


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
) -> tuple[SharedSAE, Job]:
    """A pending SAE and its queued job. 400 for a path that leads out of the repository. Asks the Hub nothing."""
    repo_id, path = check_repo(repo_id), relative_name(filepath)
    last = path.rsplit("/", 1)[-1]
    sae = SharedSAE(
        name=name or f"{repo_id.split('/')[1]} {last if path != '.' else ''}".strip()[:255],
        description=description,
        source="huggingface",
        status="pending",
        hf_repo_id=repo_id,
        hf_filepath=path,
        hf_revision=revision or None,
        model_name=model_name or None,
        model_id=model_id or None,
        sae_metadata={},
    )
    params = {"repo_id": repo_id, "filepath": path, "revision": revision or None, "model_name": model_name or None}
    return sae, add(service, sae, "download", params, access_token)


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
    repo_id, path = check_repo(repo_id), relative_name(filepath)
    if not access_token and not service.settings.uses_server_token:
        raise ServiceError("forbidden", "An upload needs a token", "provide access_token", status=403)
    with service.db.read() as session:
        sae = get_sae(session, sae_id)
        if sae.status != "ready":
            raise not_ready(sae_id, sae.status)
    params = {
        "repo_id": repo_id,
        "filepath": path,
        "create_repo": create_repo,
        "private": private,
        "commit_message": commit_message,
    }
    return add(service, sae, "upload", params, access_token)


def available_training(service: Service, training_id: str) -> dict[str, Any]:
    """GET /training/{id}/available: training_id, available_saes, imported_saes, total_count. 404 for no such run."""
    found = trained(service.settings, training_id)
    with service.db.read() as session:
        imported = _imported(session, [sae.path for sae in found])
    columns = ("layer", "hook_type", "path", "size_bytes")
    return {
        "training_id": training_id,
        "available_saes": [{name: getattr(sae, name) for name in columns} for sae in found],
        "imported_saes": [
            {
                "layer": sae.layer,
                "hook_type": sae.hook_type,
                "sae_id": sae.id,
                "sae_name": sae.name,
                "imported_at": sae.created_at,
            }
            for sae in imported.values()
        ],
        "total_count": len(found),
    }


def _imported(session: Session, paths: Sequence[str]) -> dict[str, SharedSAE]:
    """The SAEs of the library that came, or are coming, from these runs."""
    there = select(SharedSAE).where(SharedSAE.source == "trained", SharedSAE.status.not_in(("deleted", "error")))
    rows = session.scalars(there.order_by(SharedSAE.created_at))
    return {str(run): sae for sae in rows if (run := sae.sae_metadata.get("run")) in paths}


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
    """A pending SAE and a queued job for each SAE of the run or sweep that is chosen and not imported yet. 404; 409
    where it is not finished, or all of it is here; 400 where nothing fits what was asked."""
    found = trained(service.settings, training_id)
    if not found:
        raise conflict(f"The training is not finished: {training_id}", "import it when it has a manifest.json")
    chosen = [
        sae
        for sae in found
        if (layers is None or sae.layer in layers) and (hook_types is None or sae.hook_type in hook_types)
    ]
    if not chosen or (not import_all and layers is None and hook_types is None):
        have = sorted({f"layer {sae.layer} {sae.hook_type}" for sae in found})
        raise bad_request(f"No SAE of {training_id} is chosen", f"it has {', '.join(have[:8])}; or set import_all")
    rows, jobs = [], []
    with service.db.write() as session:
        imported = _imported(session, [sae.path for sae in chosen])
        for sae in chosen:
            if sae.path in imported:
                continue
            row = SharedSAE(
                name=_name_of_trained(name, sae, alone=len(chosen) == 1),
                description=description,
                source="trained",
                status="pending",
                training_id=training_id,
                layer=sae.layer,
                hook_type=sae.hook_type,
                hook_name=sae.hook_name,
                sae_metadata={"run": sae.path},
            )
            session.add(row)
            session.flush()
            jobs.append(Job(kind="import_training", sae_id=row.id, params={"path": sae.path}, seq=next_seq(session)))
            session.add(jobs[-1])
            rows.append(row)
    if not rows:
        raise conflict(f"Imported already: {training_id} is {', '.join(sae.id for sae in imported.values())}")
    for job in jobs:
        wake(service.db, service.send, job.kind, job.id)
    return Imported(training_id, rows)


def _name_of_trained(name: str | None, sae: Trained, *, alone: bool) -> str:
    own = sae.path.rsplit("/", 1)[-1]
    return (own if name is None else name if alone else f"{name} {own}")[:255]


def create_import_file(
    service: Service,
    *,
    file_path: str,
    name: str,
    description: str | None = None,
    format: str = "community_standard",
    model_name: str | None = None,
    layer: int | None = None,
) -> tuple[SharedSAE, Job]:
    """A pending SAE and its queued job. `format` may be `saelens`. 400 `file_not_found` outside the import roots."""
    shown = "community_standard" if format == "saelens" else format
    if shown not in FORMATS:
        raise bad_request(f"unknown format {format[:60]!r}", f"use one of {', '.join(FORMATS)}, saelens")
    storage.inside(file_path, service.settings.import_roots)
    sae = SharedSAE(
        name=name,
        description=description,
        source="local",
        status="pending",
        model_name=model_name or None,
        layer=layer,
        format=shown,
        sae_metadata={},
    )
    params = {"file_path": file_path, "format": shown, "model_name": model_name or None}
    return sae, add(service, sae, "import_file", params, None)


def check_repo(repo_id: str) -> str:
    """A repository's name, as `user/name`. 400 for anything else."""
    try:
        return check_repo_id(repo_id)
    except MechintError:
        raise bad_request(f"Not a repository name: {repo_id[:100]!r}", "give it as user/name") from None


def add(service: Service, sae: SharedSAE, kind: str, params: dict[str, Any], token: str | None) -> Job:
    """Write a job, and its SAE if that is new, in one transaction; then wake a worker."""
    cipher, until = tokens.hide(service.settings, token)
    with service.db.write() as session:
        if kind not in DOWNLOADS:
            # deleted since it was looked at?
            sae_id = get_sae(session, sae.id).id
        else:
            session.add(sae)
            session.flush()
            sae_id = sae.id
        params = {**params, "with_token": bool(token)}
        job = Job(kind=kind, sae_id=sae_id, params=params, token_cipher=cipher, token_until=until)
        job.seq = next_seq(session)
        session.add(job)
    wake(service.db, service.send, kind, job.id)
    return job


# --- ending it --------------------------------------------------------------------------------------------------------


def delete_sae(service: Service, sae_id: str, *, delete_files: bool = True) -> None:
    """Take it out of the library, cancel its jobs, remove its files. 404."""
    with service.db.write() as session:
        sae = get_sae(session, sae_id)
        for job in session.scalars(select(Job).where(Job.sae_id == sae_id, Job.state.in_(LIVE)).with_for_update()):
            _cancel(session, job)
        kept = sae.local_path if not delete_files and sae.status == "ready" else None
        sae.status, sae.local_path = "deleted", kept
    # the row first: a crash here leaves files that the sweep takes for what they are
    if kept is None:
        storage.discard(service.settings, storage.sae_folder(service.settings, sae_id))


def delete_saes(service: Service, sae_ids: Sequence[str], *, delete_files: bool = True) -> Deleted:
    """Several at once; one that cannot be deleted leaves the others alone."""
    deleted: list[str] = []
    errors: dict[str, str] = {}
    for sae_id in dict.fromkeys(sae_ids):
        try:
            delete_sae(service, sae_id, delete_files=delete_files)
            deleted.append(sae_id)
        except ServiceError as error:
            errors[sae_id] = error.message
    return Deleted(deleted, list(errors), errors)


def cancel(service: Service, *, job_id: str | None = None, sae_id: str | None = None) -> list[Job]:
    """Cancel a job, or the live jobs of an SAE: a waiting one at once, a running one at its next chunk of bytes. 404;
    409 `conflict` if nothing is live."""
    with service.db.write() as session:
        if job_id is not None:
            get_job(session, job_id)
            job = locked(session, job_id)
            jobs = [job] if job is not None and job.state in LIVE else []
        else:
            get_sae(session, sae_id or "")
            live = select(Job).where(Job.sae_id == sae_id, Job.state.in_(LIVE)).with_for_update()
            jobs = list(session.scalars(live))
        if not jobs:
            raise conflict("Nothing to cancel: it has ended")
        for job in jobs:
            _cancel(session, job)
    return jobs


def _cancel(session: Session, job: Job) -> None:
    if job.state == "queued":
        cancelled(session, job)
    else:
        touch(session, job, cancel_requested=True, message="Cancelling")


def retry(service: Service, sae_id: str, *, access_token: str | None = None) -> Job:
    """Queue the last job of an SAE in error again, from the beginning. 409 if there is none."""
    with service.db.write() as session:
        sae = get_sae(session, sae_id)
        last = session.scalars(
            select(Job).where(Job.sae_id == sae_id, Job.kind.in_(DOWNLOADS)).order_by(Job.created_at.desc())
        ).first()
        if sae.status != "error" or last is None or last.state in LIVE:
            raise conflict(f"Nothing to retry: {sae_id} is {sae.status}")
        sae.status, sae.progress, sae.error_message = "pending", 0.0, None
        cipher, until = tokens.hide(service.settings, access_token)
        params = {**last.params, "with_token": bool(access_token)}
        job = Job(kind=last.kind, sae_id=sae_id, params=params, token_cipher=cipher, token_until=until)
        job.seq = next_seq(session)
        session.add(job)
    wake(service.db, service.send, job.kind, job.id)
    return job


def wait_for(service: Service, job_id: str, seconds: float) -> Job:
    """The job once it has ended, or as it is after `seconds`; for clients that want an upload's answer in place."""
    until = time.monotonic() + seconds
    while True:
        with service.db.read() as session:
            job = get_job(session, job_id)
        if job.state not in LIVE or time.monotonic() >= until:
            return job
        time.sleep(0.1)
