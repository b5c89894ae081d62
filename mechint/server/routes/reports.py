"""The report of the run that an SAE was trained in, as a page that can do nothing but be looked at."""

import os
import stat
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse

from mechint.server import library
from mechint.server.errors import ServiceError
from mechint.server.features import run_folder
from mechint.server.routes.shared import SaeIdOf, ServiceOf, SettingsOf, errors

router = APIRouter(tags=["reports"])

# A run directory may come from anywhere: its page gets an origin of its own (sandbox), so that a script in it can read
# nothing of this server and ask it for nothing. The report keeps its data and its script in itself.
POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
)
MAX_BYTES = 512 << 20


@router.get(
    "/{sae_id}/report",
    response_class=FileResponse,
    responses=errors(404) | {200: {"content": {"text/html": {}}, "description": "report.html"}},
    summary="The report of its training run",
)
def get_report(sae_id: SaeIdOf, service: ServiceOf, settings: SettingsOf) -> FileResponse:
    with service.db.read() as session:
        row = library.get_sae(session, sae_id)
    run = run_folder(settings, row)
    found = contained_file(run, "report.html") if run is not None else None
    if found is None:
        name = run.name if run is not None else "RUN"
        raise ServiceError(
            "report_not_found",
            f"There is no report of the run of {sae_id}",
            f"`mechint report {name}` makes one" if run is not None else "only SAEs of this server's runs have one",
            status=404,
        )
    return FileResponse(
        found,
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": POLICY, "X-Frame-Options": "SAMEORIGIN"},
    )


def contained_file(folder: Path, name: str) -> Path | None:
    """A plain file right in `folder`, which is no link to elsewhere; None for anything else."""
    path = folder / name
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return path if stat.S_ISREG(status.st_mode) and status.st_size <= MAX_BYTES else None
