"""The Celery tasks. Each gets a job's id, claims the job, does the work and records how it ended."""

import logging
import threading
from collections.abc import Callable
from functools import lru_cache

from celery import shared_task
from sqlalchemy.exc import OperationalError

from mechint.errors import DISK_FULL_ERRNOS, MechintError, one_line
from mechint.server.broker import TASKS
from mechint.server.db import Database, open_database
from mechint.server.errors import ServiceError
from mechint.server.jobs import (
    RETRY_SECONDS,
    Cancelled,
    Interrupted,
    LeaseLost,
    Running,
    cancelled,
    claim,
    fail,
    release,
)
from mechint.server.settings import Settings, settings_from
from mechint.server.storage import unstage

log = logging.getLogger(__name__)

# Held while a job runs.
BUSY = threading.Lock()
# Set when this worker process is asked to end; a running job is then put back for another one.
STOPPING = threading.Event()


def work_of(kind: str) -> Callable[[Running], None]:
    """What does a kind of job; imported on its first one, as torch comes with it."""
    if kind == "download":
        from mechint.server.download import run_download

        return run_download
    if kind == "upload":
        from mechint.server.upload import run_upload

        return run_upload
    if kind == "publish":
        from mechint.server.publishing import run_publish

        return run_publish
    from mechint.server.importing import run_import_file, run_import_training

    return run_import_training if kind == "import_training" else run_import_file


def execute(settings: Settings, db: Database, job_id: str, *, stop: threading.Event = STOPPING) -> str:
    """Do a job from its claim to its end. Returns its state afterwards, or "not claimed"."""
    running = claim(settings, db, job_id, stop=stop)
    if running is None:
        return "not claimed"
    log.info("job %s: %s of %s, attempt %d", running.id, running.kind, running.sae_id, running.attempt)
    try:
        with running.alive():
            work_of(running.kind)(running)
        state = "done"
    except LeaseLost:
        log.warning("job %s: another worker has it now", running.id)
        return "lost"  # and its staging folder is the other one's
    except Interrupted:
        release(running)
        return "queued"
    except Cancelled:
        state = ended(running, None)
    except ServiceError as error:
        if error.retryable and running.attempt < settings.max_attempts:
            seconds = float(error.retry_after or RETRY_SECONDS[min(running.attempt, len(RETRY_SECONDS)) - 1])
            release(running, seconds=seconds, message=f"{error.message}; next try in {seconds:.0f} s", counts=True)
            return "queued"
        state = ended(running, error)
    except MechintError as error:
        state = ended(running, ServiceError("failed", one_line(error, 500)))
    except BrokenPipeError:  # Celery's signal handler writes to a terminal that is gone, in the middle of our work
        release(running, seconds=RETRY_SECONDS[0], message="Queued again: the worker was told to end", counts=True)
        return "queued"
    except OSError as error:
        if error.errno not in DISK_FULL_ERRNOS:
            log.exception("job %s", running.id)
            state = ended(running, ServiceError("internal", f"Internal error: {type(error).__name__}"))
        else:
            state = ended(
                running, ServiceError("disk_full", "No room left on the server's disk", "make room and retry")
            )
    except MemoryError:
        state = ended(running, ServiceError("memory_full", "Not enough memory for this SAE", "choose a smaller one"))
    except OperationalError as error:  # the database was away or too busy; what it says may come through again
        log.warning("job %s: the database failed (%s)", running.id, one_line(error.orig, 120))
        release(running, seconds=RETRY_SECONDS[0], message="Queued again: the database failed", counts=True)
        return "queued"
    except Exception as error:  # our own mistake: its text may hold anything, so only its name is told
        log.exception("job %s", running.id)
        state = ended(running, ServiceError("internal", f"Internal error: {type(error).__name__}"))
    if state != "lost":
        unstage(settings, running.id)
    log.info("job %s: %s", running.id, state)
    return state


def ended(running: Running, error: ServiceError | None) -> str:
    """Record that the job ends in error, or was cancelled; what another worker has taken over stays as it is."""
    try:
        with running.held() as (session, job, _):
            if error is None or job.cancel_requested:
                cancelled(session, job)
            else:
                log.info("job %s: %s", running.id, error)
                fail(session, job, str(error), error.code)
            return job.state
    except LeaseLost:
        return "lost"


@lru_cache(maxsize=1)
def opened() -> tuple[Settings, Database]:
    """This worker's settings and database, from its environment."""
    settings = settings_from()
    return settings, open_database(settings)


def _run(job_id: str) -> str:
    with BUSY:
        return "not claimed" if STOPPING.is_set() else execute(*opened(), job_id)


@shared_task(name=TASKS["download"])
def download(job_id: str) -> str:
    """From the Hub into the library."""
    return _run(job_id)


@shared_task(name=TASKS["upload"])
def upload(job_id: str) -> str:
    """From the library to the Hub."""
    return _run(job_id)


@shared_task(name=TASKS["publish"])
def publish(job_id: str) -> str:
    """From the library to the Hub, as a bundle."""
    return _run(job_id)


@shared_task(name=TASKS["import_training"])
def import_training(job_id: str) -> str:
    """From a run directory into the library."""
    return _run(job_id)


@shared_task(name=TASKS["import_file"])
def import_file(job_id: str) -> str:
    """From a folder of the server into the library."""
    return _run(job_id)
