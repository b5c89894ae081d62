"""The Celery application: `celery -A mechint.server.celery_app worker -Q sae` with the server's MECHINT_* variables.

The same tasks run on a Redis broker (MECHINT_BROKER_URL=redis://...) on any number of machines that share the data
folder and the database, and on the embedded broker on one machine.
"""

from mechint.server.broker import make_app
from mechint.server.settings import settings_from

app = make_app(settings_from())
