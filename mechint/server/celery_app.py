"""The Celery application: `celery -A mechint.server.celery_app worker -Q sae` with the server's MECHINT_* variables.

The same tasks run on a Redis broker (MECHINT_BROKER_URL=redis://...) on any number of machines that share the data
folder and the database, and on the embedded broker on one machine.
"""

from celery import Celery

from mechint.provenance import make_dir
from mechint.server import broker
from mechint.server.settings import Settings, settings_from


def make_app(settings: Settings) -> Celery:
    """The application for these settings. Makes the embedded broker's folder; connects to nothing."""
    # what `celery worker` imports: the tasks, and the reaper that starts with it
    made = Celery("mechint", include=["mechint.server.tasks", "mechint.server.watch"])
    made.conf.update(
        task_default_queue=broker.QUEUE,
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
            broker_url=f"{broker.SCHEME}://",
            broker_transport_options={
                "data_folder_in": str(queue),
                "data_folder_out": str(queue),
                "control_folder": str(settings.broker_dir / "control"),
                "polling_interval": broker.POLL_SECONDS,
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


app = make_app(settings_from())
