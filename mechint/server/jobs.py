"""Jobs: a row in the database that one worker at a time holds.

    queued --claim--> running --finish--> done
      ^                  |  +---fail----> error        cancel: queued at once, running at its next report
      +----release/reap--+  +---cancel--> cancelled

A claim is one UPDATE that fits a queued job or one whose lease has ended. The lease is kept alive by a thread; whoever
finds that it is not his any more (`attempts` counts the claims, so a late worker cannot take itself for the new one)
stops and changes nothing. `reap` puts jobs back whose lease has ended, and wakes a worker for those that no message
reached. So a lost, doubled or late message changes nothing, and a kill anywhere costs one lease at most.
"""

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from mechint.errors import one_line
from mechint.server import tokens
from mechint.server.db import Database, next_seq
from mechint.server.models import LIVE, Job, SharedSAE, utc_now
from mechint.server.settings import Settings

log = logging.getLogger(__name__)

# A report is written this often at most; what is in between only the worker knows.
REPORT_SECONDS = 0.2
# A queued job that no worker has taken for so long gets another message.
WAKE_SECONDS = 20.0
RETRY_SECONDS = (2.0, 10.0, 60.0, 300.0)
# Not to be told as a failure of the Hub, and not to be tried again.
OUR_MISTAKES = (ImportError, AttributeError, NameError, TypeError, LookupError, AssertionError)
DOWNLOADS = ("download", "import_training", "import_file")


class Stop(Exception):
    """The work must not go on; what is on disk stays for whoever comes next."""


class LeaseLost(Stop):
    """Another worker has the job now."""


class Cancelled(Stop):
    """The user has cancelled it."""


class Interrupted(Stop):
    """This worker is shutting down; another one will go on."""


def worker_name() -> str:
    """`place:pid`, which tells whether a worker of this machine is still there."""
    return f"{_place()}:{os.getpid()}"


def _place() -> str:
    """Where a process id means something: the host, and the container on it."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}/{space}"


def is_gone(worker_id: str | None) -> bool:
    """Whether that worker is known to run no more: it let go of the job, or its process on this machine has ended."""
    if worker_id is None:
        return True
    place, _, pid = worker_id.rpartition(":")
    if place != _place() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[:1] == ["Z"]  # ended, but its parent has not looked yet
    except ProcessLookupError:
        return True
    except OSError:
        return False


# --- one change of a row ----------------------------------------------------------------------------------------------


def touch(session: Session, job: Job, **changes: Any) -> None:
    """Change a job within a transaction that holds its row, and number the change for those who watch."""
    for name, value in changes.items():
        setattr(job, name, value)
    job.seq = next_seq(session)
    job.updated_at = utc_now()


def locked(session: Session, job_id: str) -> Job | None:
    """The job, locked until the transaction ends (SQLite: the whole database is)."""
    return session.execute(select(Job).where(Job.id == job_id).with_for_update()).scalar_one_or_none()


def end(session: Session, job: Job, state: str, **changes: Any) -> None:
    """A job that is over: no lease, no token."""
    changes = {"message": state, **changes}
    touch(session, job, state=state, worker_id=None, lease_until=None, token_cipher=None, token_until=None, **changes)
    job.finished_at = utc_now()


def fail(session: Session, job: Job, error: str, code: str) -> None:
    """The job ends in error; so does the SAE, unless it was only being uploaded."""
    end(session, job, "error", error=error, error_code=code, message=error)
    sae = session.get(SharedSAE, job.sae_id)
    if sae is not None and job.kind in DOWNLOADS and sae.status != "deleted":
        sae.status, sae.error_message = "error", error


def cancelled(session: Session, job: Job) -> None:
    end(session, job, "cancelled", error="Cancelled", error_code="cancelled", message="Cancelled")
    sae = session.get(SharedSAE, job.sae_id)
    if sae is not None and job.kind in DOWNLOADS and sae.status != "deleted":
        sae.status, sae.error_message = "error", "Cancelled"


def status_of(job: Job) -> str:
    """The status that events of this job carry: pending, downloading, converting, uploading, ready or error."""
    if job.state in ("error", "cancelled"):
        return "error"
    if job.state == "done":
        return "ready"
    if job.stage == "queued":
        return "pending"
    return {"download": "downloading", "convert": "converting", "upload": "uploading"}.get(job.stage, "converting")


# --- claiming ---------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A job in the hands of this worker. Its methods raise `Stop` when the work must end."""

    settings: Settings
    db: Database
    id: str
    kind: str
    sae_id: str
    params: dict[str, Any]
    token: str | None
    attempt: int
    worker_id: str
    previous_worker: str | None
    stop: threading.Event
    lost: threading.Event = field(default_factory=threading.Event)
    cancel: threading.Event = field(default_factory=threading.Event)
    _reported: float = 0.0
    _progress: float = 0.0

    def check(self) -> None:
        """Raise if the work must not go on. Cheap: call it between chunks of bytes."""
        if self.lost.is_set():
            raise LeaseLost
        if self.cancel.is_set():
            raise Cancelled
        if self.stop.is_set():
            raise Interrupted

    def report(
        self,
        stage: str,
        progress: float,
        message: str,
        *,
        bytes_done: int | None = None,
        bytes_total: int | None = None,
        always: bool = False,
    ) -> None:
        """Say how far the work is (percent), a few times a second at most; progress never goes back."""
        self.check()
        now = time.monotonic()
        if not always and now - self._reported < REPORT_SECONDS:
            return
        self._reported = now
        self._progress = max(self._progress, min(progress, 100.0))
        with self.held() as (session, job, sae):
            changes: dict[str, Any] = {"stage": stage, "progress": self._progress, "message": message}
            if bytes_done is not None:
                changes["bytes_done"] = bytes_done
            if bytes_total is not None:
                changes["bytes_total"] = bytes_total
            touch(session, job, **changes)
            if self.kind in DOWNLOADS and sae is not None and sae.status != "deleted":
                sae.status, sae.progress = status_of(job), self._progress
        self.check()

    @contextlib.contextmanager
    def held(self) -> Iterator[tuple[Session, Job, SharedSAE | None]]:
        """A transaction in which the job is locked and ours: `(session, job, its SAE)`. Raises `LeaseLost` if not."""
        with self.db.write() as session:
            job = locked(session, self.id)
            if job is None or job.state != "running" or job.attempts != self.attempt or job.worker_id != self.worker_id:
                self.lost.set()
                raise LeaseLost
            if job.cancel_requested:
                self.cancel.set()
            job.lease_until = time.time() + self.settings.lease_seconds
            yield session, job, session.get(SharedSAE, job.sae_id)

    @contextlib.contextmanager
    def alive(self) -> Iterator[None]:
        """Keep the lease while the block runs, and look whether the job was cancelled."""
        done = threading.Event()

        def beat() -> None:
            pause = min(self.settings.lease_seconds / 4, 2.0)
            while not done.wait(pause):
                try:
                    with self.held():
                        pass
                except LeaseLost:
                    return
                except Exception:  # a database that is away for a moment; the lease decides
                    log.exception("job %s: its lease could not be kept", self.id)

        thread = threading.Thread(target=beat, name=f"lease-{self.id}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(timeout=30)


def claim(settings: Settings, db: Database, job_id: str, *, stop: threading.Event | None = None) -> Running | None:
    """Take the job, if it is to be had. None if it has ended, waits for its time, or another worker holds it."""
    now, name = time.time(), worker_name()
    with db.write() as session:
        job = locked(session, job_id)
        if job is None or job.state not in LIVE or (job.state == "queued" and job.not_before > now):
            return None
        if job.state == "running" and (job.lease_until or 0.0) > now and not is_gone(job.worker_id):
            return None
        if job.cancel_requested:
            cancelled(session, job)
            return None
        if job.attempts >= settings.max_attempts:
            fail(session, job, exhausted(job), "worker_lost")
            return None
        previous = job.worker_id
        touch(
            session,
            job,
            state="running",
            worker_id=name,
            lease_until=now + settings.lease_seconds,
            attempts=job.attempts + 1,
            started_at=job.started_at or utc_now(),
            message="Starting",
        )
        token = tokens.reveal(settings, job.token_cipher)
        return Running(
            settings, db, job.id, job.kind, job.sae_id, dict(job.params), token, job.attempts, name, previous,
            stop or threading.Event(), _progress=job.progress,
        )  # fmt: skip


def exhausted(job: Job) -> str:
    """Why a job that was begun too often ends."""
    last = f"; last: {job.message}" if job.message else ""
    return f"Given up after {job.attempts} attempts: the worker ended in the middle each time{last}"


def release(running: Running, *, seconds: float = 0.0, message: str = "Queued", counts: bool = False) -> None:
    """Put the job back; it is not claimed before `seconds` have passed."""
    with contextlib.suppress(LeaseLost), running.held() as (session, job, sae):
        attempts = job.attempts if counts else job.attempts - 1
        until = time.time() + seconds
        touch(
            session, job, state="queued", stage="queued", worker_id=None, lease_until=None, not_before=until,
            woken_at=0.0, attempts=attempts, message=message,
        )  # fmt: skip
        if sae is not None and running.kind in DOWNLOADS and sae.status != "deleted":
            sae.status = "pending"


# --- waking and reaping -----------------------------------------------------------------------------------------------

Wake = Callable[[str, str], None]  # (kind, job id) -> sends a message; may raise


def wake(db: Database, send: Wake, kind: str, job_id: str) -> bool:
    """Send a message for a job. A broker that is away costs nothing but time: `reap` tries again."""
    try:
        send(kind, job_id)
    except Exception as error:  # each broker has errors of its own
        log.warning("job %s: no worker could be woken (%s); tried again later", job_id, one_line(error, 120))
        return False
    with db.write() as session:
        session.execute(update(Job).where(Job.id == job_id).values(woken_at=time.time(), updated_at=Job.updated_at))
    return True


def reap(settings: Settings, db: Database, send: Wake, *, restarted: bool = False) -> int:
    """Put back what dead workers held, and wake workers for what waits. Returns how many jobs were put back.

    `restarted`: whether the embedded broker's messages may be gone with its worker, so that all that waits is woken.
    """
    now = time.time()
    with db.read() as session:
        held = session.execute(select(Job.id, Job.worker_id, Job.lease_until).where(Job.state == "running")).all()
        expired = session.execute(select(Job.id).where(Job.token_until < now)).scalars().all()
    lost = [job_id for job_id, worker, until in held if (until or 0.0) <= now or is_gone(worker)]
    put_back = 0
    for job_id in lost:
        with db.write() as session:
            job = locked(session, job_id)
            if job is None or job.state != "running" or not ((job.lease_until or 0.0) <= now or is_gone(job.worker_id)):
                continue
            put_back += 1
            if job.cancel_requested:
                cancelled(session, job)
            elif job.attempts >= settings.max_attempts:
                fail(session, job, exhausted(job), "worker_lost")
            else:
                # its worker stays named: whether that one is gone decides if its files can be gone on with
                touch(session, job, state="queued", lease_until=None, woken_at=0.0, message="Queued again")
                sae = session.get(SharedSAE, job.sae_id)
                if sae is not None and job.kind in DOWNLOADS and sae.status != "deleted":
                    sae.status = "pending"
    for job_id in expired:
        with db.write() as session:
            job = locked(session, job_id)
            if job is not None and job.token_until is not None and job.token_until < now:
                job.token_cipher, job.token_until = None, None
    stale = or_(Job.woken_at < now - WAKE_SECONDS, Job.woken_at == 0.0)
    with db.read() as session:
        waiting = select(Job.id, Job.kind).where(Job.state == "queued", Job.not_before <= now).order_by(Job.created_at)
        waiting = session.execute(waiting if restarted else waiting.where(stale)).all()
    for job_id, kind in waiting:
        if not wake(db, send, kind, job_id):
            break
    return put_back
