"""The panel's pages. They read; what changes something is asked of the API by panel.js.

/                           the library: filters, search, paging
/add                        download from the Hub: look into a repository, choose
/import                     training runs, and files of the folders that the operator allows
/saes/{id}                  everything about one SAE
/saes/{id}/features[/{n}]   its features; one of them
/saes/{id}/compare          beside another one
/login                      where the server has an API key
"""

import datetime
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import FileResponse, HTMLResponse, Response
from fastapi.staticfiles import StaticFiles
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.exceptions import HTTPException

import mechint.report
from mechint.errors import MechintError
from mechint.provenance import read_json
from mechint.server import features, library
from mechint.server.errors import ServiceError, sae_not_found
from mechint.server.events import UPLOADS
from mechint.server.features import run_folder
from mechint.server.models import FORMATS, SOURCES, STATUSES, Job, SharedSAE
from mechint.server.panel import runs
from mechint.server.panel.render import neuronpedia_page, number, page, render
from mechint.server.routes.compare import compare as compare_api
from mechint.server.routes.features import ready_sae
from mechint.server.routes.hf import preview_repository
from mechint.server.routes.reports import contained_file
from mechint.server.routes.shared import ServiceOf, SettingsOf
from mechint.server.schemas import CompareRequest, FeatureSort, PreviewRequest
from mechint.server.storage import sae_folder

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)

HERE = Path(__file__).parent
REPORT_CSS = Path(mechint.report.__file__).parent / "assets" / "report.css"
PAGE_SIZE, FEATURES_PAGE, RUNS_PAGE = 25, 50, 50
MAX_LIVE = 1000
ORDERS = {
    "newest": ("Newest first", "created_at", "desc"),
    "changed": ("Last changed first", "updated_at", "desc"),
    "name": ("Name", "name", "asc"),
    "model": ("Model", "model_name", "asc"),
    "layer": ("Layer", "layer", "asc"),
    "features": ("Most features", "n_features", "desc"),
    "size": ("Largest", "file_size_bytes", "desc"),
}
FEATURE_ORDERS = {
    "feature_idx": "Number",
    "density": "Most often active",
    "max_activation": "Highest activation",
    "mean_activation": "Highest mean",
}


def mount(app: FastAPI) -> None:
    """Add the panel to the service."""
    # the colours and type of the reports, so that the two look alike and stay so
    app.add_api_route("/static/report.css", _report_css, methods=["GET"], include_in_schema=False)
    app.mount("/static", StaticFiles(directory=HERE / "static"), name="static")
    app.include_router(router)
    told = app.exception_handlers[HTTPException]

    async def shown(request: Request, error: Any) -> Any:
        """A person who mistyped an address gets a page; a program gets what it always does."""
        is_page = request.method == "GET" and not request.url.path.startswith(("/api/", "/static/"))
        if error.status_code == 404 and is_page and "text/html" in request.headers.get("accept", ""):
            nothing = ServiceError("not_found", "There is no such page", "see whether the address is right", status=404)
            return render(request, "error.html", status=404, error=nothing)
        return await told(request, error)  # type: ignore[misc]

    app.add_exception_handler(HTTPException, shown)


async def _report_css() -> FileResponse:
    return FileResponse(REPORT_CSS, media_type="text/css")


@router.get("/favicon.ico")
async def favicon() -> FileResponse:
    return FileResponse(HERE / "static" / "icon.svg", media_type="image/svg+xml")


# --- the library ------------------------------------------------------------------------------------------------------


@router.get("/")
@page
def library_page(request: Request, service: ServiceOf) -> HTMLResponse:
    asked = request.query_params
    query, source, status = asked.get("q", "").strip()[:255], asked.get("source", ""), asked.get("status", "")
    sort = asked.get("sort", "newest")
    _, sort_by, order = ORDERS.get(sort, ORDERS["newest"])
    at = number(request, "page", 1, least=1)
    with service.db.read() as session:
        given: dict[str, Any] = {"search": query or None, "source": source or None, "status": status or None}
        given |= {"sort_by": sort_by, "order": order, "limit": PAGE_SIZE}
        found = library.list_saes(session, skip=(at - 1) * PAGE_SIZE, **given)
        last = max(1, -(-found.total // PAGE_SIZE))
        if at > last:  # the last one of a page was deleted
            at = last
            found = library.list_saes(session, skip=(at - 1) * PAGE_SIZE, **given)
        total = library.list_saes(session, limit=1).total
        live = live_jobs(library.list_jobs(session, live=True, limit=MAX_LIVE))
        failed = failed_uploads(session, [sae.id for sae in found.items])
    return render(
        request,
        "library.html",
        saes=found.items,
        found=found.total,
        total=total,
        live=live,
        failed=failed,
        query=query,
        source=source,
        wanted_status=status,
        sort=sort if sort in ORDERS else "newest",
        orders=ORDERS,
        sources=SOURCES,
        statuses=[name for name in STATUSES if name != "deleted"],
        at=at,
        last=last,
        server_token=service.settings.uses_server_token,
    )


def live_jobs(jobs: list[Job]) -> dict[str, Job]:
    """The newest live job of each SAE, of a list that has the newest first."""
    return {job.sae_id: job for job in reversed(jobs)}


def failed_uploads(session: Session, sae_ids: list[str]) -> dict[str, str]:
    """Why the last upload of an SAE failed, of those whose last one did: the SAE itself is ready all the same."""
    wanted = select(Job).where(Job.sae_id.in_(sae_ids), Job.kind.in_(UPLOADS)).order_by(Job.created_at)
    last = {job.sae_id: job for job in session.scalars(wanted)}
    return {sae_id: job.error or job.message for sae_id, job in last.items() if job.state == "error"}


# --- adding -----------------------------------------------------------------------------------------------------------


@router.get("/add")
@page
def add_page(request: Request, settings: SettingsOf) -> HTMLResponse:
    """With `repo_id` it looks into the repository at once: so it does without a script, too."""
    repo_id = request.query_params.get("repo_id", "").strip()
    preview, problem = None, None
    if repo_id:
        try:
            preview = _preview(PreviewRequest(repo_id=repo_id), settings)
        except ServiceError as error:
            problem = error
        except ValueError:  # pydantic's; its text repeats what was given
            problem = ServiceError("bad_request", "Not a repository name", "give it as user/name")
    return render(
        request,
        "add.html",
        status=problem.status if problem else 200,
        repo_id=repo_id[:500],
        preview=preview,
        problem=problem,
        server_token=settings.uses_server_token,
    )


@router.post("/add/preview")
def preview_part(asked: PreviewRequest, request: Request, settings: SettingsOf) -> HTMLResponse:
    """What is in a repository, as a part of /add. A token comes in the body only, and goes nowhere but to the Hub."""
    return render(request, "_preview.html", preview=_preview(asked, settings))


def _preview(asked: PreviewRequest, settings: SettingsOf) -> dict[str, Any]:
    found = preview_repository(asked, settings)
    inside: dict[str, int] = defaultdict(int)
    for file in found["sae_files"]:
        inside[str(PurePosixPath(file["filepath"]).parent)] += file["size_bytes"]
    return found | {"sizes": inside}


@router.get("/import")
@page
def import_page(request: Request, service: ServiceOf) -> HTMLResponse:
    search = request.query_params.get("q", "").strip()[:255]
    names = runs.names(service, search)
    last = max(1, -(-len(names) // RUNS_PAGE))
    at = number(request, "page", 1, least=1, most=last)
    found = runs.listed(service, names[(at - 1) * RUNS_PAGE : at * RUNS_PAGE])
    dates = {run.training_id: datetime.datetime.fromtimestamp(run.modified, datetime.UTC) for run in found}
    return render(
        request,
        "import.html",
        runs=found,
        dates=dates,
        n_runs=len(names),
        query=search,
        at=at,
        last=last,
        runs_root=service.settings.runs_root,
        import_roots=service.settings.import_roots,
        formats=FORMATS,
    )


# --- one SAE ----------------------------------------------------------------------------------------------------------


@router.get("/saes/{sae_id}")
@page
def sae_page(sae_id: str, request: Request, service: ServiceOf) -> HTMLResponse:
    row, live = _row(service, sae_id)
    with service.db.read() as session:
        jobs = library.list_jobs(session, sae_id=row.id, limit=20)
        failed = failed_uploads(session, [row.id])
    run = run_folder(service.settings, row)
    certificate = None
    try:
        file = contained_file(sae_folder(service.settings, row.id) / "sae", "certificate.json")
        certificate = read_json(file, "certificate") if file is not None else None
    except MechintError:
        certificate = {"error": "certificate.json cannot be read"}
    return render(
        request,
        "sae.html",
        sae=row,
        live=live,
        jobs=jobs,
        failed=failed,
        run=run,
        has_report=run is not None and contained_file(run, "report.html") is not None,
        certificate=certificate,
        neuronpedia=neuronpedia_page(row),
        server_token=service.settings.uses_server_token,
    )


def _row(service: ServiceOf, sae_id: str) -> tuple[SharedSAE, Job | None]:
    """An SAE and its live job."""
    if not sae_id.isascii() or not sae_id.replace("_", "").isalnum():
        raise sae_not_found(sae_id[:60])
    with service.db.read() as session:
        row = library.get_sae(session, sae_id)
        jobs = library.list_jobs(session, sae_id=row.id, live=True)
    return row, live_jobs(jobs).get(row.id)


@router.get("/saes/{sae_id}/features")
@page
def features_page(sae_id: str, request: Request, service: ServiceOf) -> HTMLResponse:
    row, _ = _row(service, sae_id)
    found = request.app.state.analyses.get(ready_sae(service, sae_id))
    query = request.query_params.get("q", "").strip()[:255]
    default = FeatureSort.density if found.analysed else FeatureSort.feature_idx
    sort = request.query_params.get("sort", default)
    sort = sort if sort in FEATURE_ORDERS else default
    listed = features.search(found, query, str(sort), sort != "feature_idx")
    last = max(1, -(-len(listed) // FEATURES_PAGE))
    at = number(request, "page", 1, least=1, most=last)
    shown = listed[(at - 1) * FEATURES_PAGE : at * FEATURES_PAGE]
    lines = [features.summary(found, feature) for feature in shown]
    return render(
        request,
        "features.html",
        sae=row,
        features=lines,
        n_features=found.n_features,
        found=len(listed),
        analysed=found.analysed,
        most=max((line["density"] or 0.0 for line in lines), default=0.0),
        notes=found.notes,
        query=query,
        sort=str(sort),
        orders=FEATURE_ORDERS if found.latents is not None else dict(list(FEATURE_ORDERS.items())[:2]),
        at=at,
        last=last,
    )


@router.get("/saes/{sae_id}/features/{feature}")
@page
def feature_page(sae_id: str, feature: str, request: Request, service: ServiceOf) -> HTMLResponse:
    row, _ = _row(service, sae_id)
    found = request.app.state.analyses.get(ready_sae(service, sae_id))
    index = int(feature) if feature.isascii() and feature.isdigit() and len(feature) < 10 else -1
    told = features.detail(found, index)
    return render(
        request,
        "feature.html",
        sae=row,
        feature=told,
        concept=found.concepts.get(index),
        n_features=found.n_features,
        bars=_bars(told["histogram"], told["histogram_edges"]),
    )


def _bars(counts: list[int], edges: list[float]) -> list[dict[str, Any]]:
    """A histogram's bars in percent of its drawing."""
    most = max(counts, default=0)
    wide = 100 / max(len(counts), 1)
    return [
        {"x": round(i * wide, 3), "width": round(0.86 * wide, 3), "height": round(100 * n / most, 2), "n": n,
         "low": edges[i], "high": edges[i + 1]}
        for i, n in enumerate(counts)
    ]  # fmt: skip


@router.get("/saes/{sae_id}/compare")
@page
def compare_page(sae_id: str, request: Request, service: ServiceOf, settings: SettingsOf) -> HTMLResponse:
    row, _ = _row(service, sae_id)
    with service.db.read() as session:
        ready = library.list_saes(session, status="ready", sort_by="name", order="asc", limit=MAX_LIVE).items
    others = [sae for sae in ready if sae.id != row.id and sae.d_model == row.d_model]
    chosen, told, problem = request.query_params.get("with", ""), None, None
    other = next((sae for sae in ready if sae.id == chosen), None)
    if chosen:
        try:
            other = other or _row(service, chosen)[0]
            told = compare_api(CompareRequest(left=row.id, right=other.id, threshold=0.7, limit=20), service, settings)
        except ServiceError as error:
            problem = error
    return render(
        request,
        "compare.html",
        status=problem.status if problem else 200,
        sae=row,
        other=other,
        others=others,
        told=told,
        problem=problem,
        bars=_bars(told["histogram"], [i / 10 for i in range(11)]) if told else [],
    )


# --- signing in -------------------------------------------------------------------------------------------------------


@router.get("/login")
def login_page(request: Request) -> Response:
    return render(request, "login.html")
