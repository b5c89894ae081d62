"""The training runs and sweeps below the runs folder, for the page that imports them."""

from typing import NamedTuple

from mechint.errors import MechintError
from mechint.server import library
from mechint.server.errors import ServiceError
from mechint.server.importing import SWEEP_JSON, Trained, trained
from mechint.server.library import Service
from mechint.server.models import SharedSAE

MAX_LISTED = 10_000  # SAEs of the library that came from runs


class RunOf(NamedTuple):
    """A run directory, or a sweep with its members. `saes` pairs each finished SAE with that of the library, if any."""

    training_id: str
    is_sweep: bool
    modified: float
    saes: list[tuple[Trained, SharedSAE | None]]

    @property
    def open(self) -> list[Trained]:
        """Those that can be imported."""
        return [one for one, imported in self.saes if imported is None]


def names(service: Service, search: str = "") -> list[tuple[str, float]]:
    """`(name, time of last change)` of what may be runs, newest first."""
    root = service.settings.runs_root
    found = []
    try:
        entries = list(root.iterdir())
    except OSError:
        return []
    for entry in entries:
        wanted = not entry.name.startswith((".", "_")) and search.casefold() in entry.name.casefold()
        if wanted and any((entry / name).is_file() for name in ("config.json", SWEEP_JSON)):
            found.append((entry.name, entry.stat().st_mtime))
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def listed(service: Service, page: list[tuple[str, float]]) -> list[RunOf]:
    """What is in these runs; one that cannot be read is left out."""
    with service.db.read() as session:
        rows = library.list_saes(session, source="trained", order="asc", limit=MAX_LISTED).items
    imported = {str(row.sae_metadata.get("run")): row for row in rows if row.status != "error"}
    found = []
    for name, modified in page:
        try:
            saes = [(one, imported.get(one.path)) for one in trained(service.settings, name)]
        except (ServiceError, MechintError, OSError):
            continue
        is_sweep = (service.settings.runs_root / name / SWEEP_JSON).is_file()
        found.append(RunOf(name, is_sweep, modified, saes))
    return found
