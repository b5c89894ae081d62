"""The broker that needs no server: a message is a small file in a folder that the processes of one machine share.

kombu's file transport, less three of its habits: it writes a message where a reader may find half of it, it moves what
it reads through the system's temporary folder, and it keeps its routing table in a file that a kill can leave empty.
Messages carry a job's id and nothing else; the database says what is to be done, so losing all of them loses nothing.
"""

import contextlib
import json
import os
import time
import uuid
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.transport import TRANSPORT_ALIASES, filesystem

from mechint.provenance import make_dir
from mechint.server.jobs import Wake
from mechint.server.settings import Settings

QUEUE = "sae"
# The task that does each kind of job (mechint/server/tasks.py).
TASKS = {
    "download": "sae.download",
    "upload": "sae.upload",
    "publish": "sae.publish",
    "import_training": "sae.import_training",
    "import_file": "sae.import_file",
}
POLL_SECONDS = 0.05


class Channel(filesystem.Channel):
    """Messages appear whole, by a rename, and are taken by one reader, by a rename."""

    def get_table(self, exchange: Any) -> list[Any]:
        return [filesystem.exchange_queue_t(QUEUE, "", QUEUE)]

    def _queue_bind(self, exchange: Any, routing_key: Any, pattern: Any, queue: Any) -> None:
        pass

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:
        # the wall clock, unlike kombu's monotonic one, keeps the order over a restart of the machine
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex}.{queue}.msg"
        folder = Path(self.data_folder_out)
        hidden = folder / f".{name}"
        hidden.write_text(json.dumps(payload), encoding="utf-8")
        os.rename(hidden, folder / name)

    def _get(self, queue: str) -> Any:
        folder = Path(self.data_folder_in)
        for name in sorted(os.listdir(folder)):
            if name.partition(".")[2] != f"{queue}.msg":  # which hidden names never are
                continue
            taken = folder / f".taken-{name}"
            try:
                os.rename(folder / name, taken)
            except FileNotFoundError:
                continue  # another worker was faster
            try:
                return json.loads(taken.read_text(encoding="utf-8"))
            except ValueError:
                continue  # not ours
            finally:
                taken.unlink(missing_ok=True)
        raise Empty


class Transport(filesystem.Transport):
    """What the address `mechint-files://` stands for."""

    Channel = Channel


SCHEME = "mechint-files"
TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"


def sender(app: Celery) -> Wake:
    """`send(kind, job id)`: the message that wakes a worker. Raises what the broker's client raises."""

    def send(kind: str, job_id: str) -> None:
        app.send_task(TASKS[kind], args=[job_id], queue=QUEUE, ignore_result=True, retry=False)

    return send


def make_app(settings: Settings) -> Celery:
    """The application for these settings. Makes the embedded broker's folder; connects to nothing."""
    # what `celery worker` imports: the tasks, and the reaper that starts with it
    made = Celery("mechint", include=["mechint.server.tasks", "mechint.server.watch"])
    made.conf.update(
        task_default_queue=QUEUE,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        # a message is acknowledged when its job has ended; a job that is taken twice is claimed once
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
        broker_connection_retry_on_startup=True,
        # no second channel into workers: nobody but the database tells them what to do
        worker_enable_remote_control=False,
        worker_send_task_events=False,
    )
    if settings.embedded:
        queue = settings.broker_dir / "queue"
        make_dir(queue)
        made.conf.update(
            broker_url=f"{SCHEME}://",
            broker_transport_options={
                "data_folder_in": str(queue),
                "data_folder_out": str(queue),
                "control_folder": str(settings.broker_dir / "control"),
                "polling_interval": POLL_SECONDS,
            },
        )
    else:
        made.conf.update(
            broker_url=settings.broker,
            # longer than a job's lease: what a killed worker held is woken by the database, not by Redis
            broker_transport_options={"visibility_timeout": 6 * 3600, "socket_connect_timeout": 5},
            broker_connection_timeout=5,
        )
    return made


def clean(folder: Path, seconds: float = 300.0) -> None:
    """Remove what a process left that was killed while it wrote or took a message."""
    before = time.time() - seconds
    with contextlib.suppress(FileNotFoundError):
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.name.startswith(".") and entry.stat().st_mtime < before:
                    os.unlink(entry.path)
