"""What every worker does beside its jobs: a thread that reaps and sweeps, and the signal to put its job back."""

import logging
import threading
import time
from typing import Any

from celery.signals import after_setup_logger, worker_process_init, worker_ready, worker_shutting_down

from mechint.server import broker, storage
from mechint.server.broker import sender
from mechint.server.jobs import reap
from mechint.server.tasks import STOPPING, opened

log = logging.getLogger(__name__)

REAP_SECONDS = 1.0
SWEEP_SECONDS = 600.0


def watch_jobs() -> None:
    """Reap, and now and then sweep, until the process ends."""
    from mechint.server.celery_app import app

    settings, db = opened()
    send = sender(app)
    restarted, swept = True, None
    while not STOPPING.is_set():
        try:
            reap(settings, db, send, restarted=restarted and settings.embedded)
            restarted = False
            if swept is None or time.monotonic() - swept > SWEEP_SECONDS:
                storage.sweep(settings, db)
                broker.clean(settings.broker_dir / "queue")
                swept = time.monotonic()
        except Exception:  # the database or the disk is away for a moment; the next round tries again
            log.exception("the reaper could not work")
            STOPPING.wait(5 * REAP_SECONDS)
        STOPPING.wait(REAP_SECONDS)


@after_setup_logger.connect
def quiet(**_: Any) -> None:
    """No token in any log, and no signed address, which the HTTP library tells at level INFO."""
    from mechint.server.security import redact_logs

    for name in ("httpx", "httpx2", "httpcore", "huggingface_hub", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    redact_logs()


@worker_ready.connect
def on_ready(**_: Any) -> None:
    threading.Thread(target=watch_jobs, name="reaper", daemon=True).start()


@worker_process_init.connect
def on_child(**_: Any) -> None:
    """A forked child of a prefork pool has no use for its parent's connections."""
    if opened.cache_info().currsize:
        opened()[1].engine.dispose(close=False)


@worker_shutting_down.connect
def on_shutdown(**_: Any) -> None:
    STOPPING.set()
