"""`python -m mechint.server.worker`: the embedded worker, which `mechint serve` starts beside itself.

It takes one job at a time, and ends when the server that started it ends, however that happens: it holds the reading
end of a pipe whose other end only the server has. Ending means putting its job back; what has no time for that is put
back by the next reaper.
"""

import importlib
import logging
import os
import sys
import threading
import warnings
from typing import Any

from celery.signals import worker_shutting_down

from mechint.server.broker import QUEUE

# For a job to reach its next report, and for the database to take it back.
GRACE_SECONDS = 8.0
PIPE = "MECHINT_PARENT_PIPE"


def follow_parent(handle: int) -> None:
    """End this process when the other end of the pipe is closed."""
    while True:
        try:
            if not os.read(handle, 1):
                break
        except OSError:
            break
    leave()


def leave() -> None:
    """End the process once its job is put back. Celery would first wait for messages that do not come, and say so on
    a terminal that may be gone."""
    from mechint.server.tasks import BUSY, STOPPING

    STOPPING.set()
    BUSY.acquire(timeout=GRACE_SECONDS)
    os._exit(0)


def on_shutdown(**_: Any) -> None:
    threading.Thread(target=leave, daemon=True).start()


def main() -> int:
    """One embedded worker, until it is told to end."""
    logging.basicConfig(level=logging.INFO, format="worker: %(message)s", stream=sys.stderr)
    warnings.filterwarnings("ignore", message="You're running the worker with superuser privileges")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from mechint.server.celery_app import app
    from mechint.server.tasks import opened
    from mechint.server.watch import quiet

    quiet()
    for name in ("celery", "kombu"):
        logging.getLogger(name).setLevel(logging.ERROR)

    if handle := os.environ.get(PIPE):
        threading.Thread(target=follow_parent, args=(int(handle),), daemon=True).start()
    worker_shutting_down.connect(on_shutdown)
    opened()
    # torch takes seconds to import: not when the first job waits for it
    threading.Thread(target=importlib.import_module, args=("mechint.server.upload",), daemon=True).start()
    arguments = ["-q", "worker", "-Q", QUEUE, "-P", "solo", "-c", "1", "--loglevel=ERROR"]
    arguments += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-n", f"sae{os.getpid()}@%h"]
    app.worker_main(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
