"""The library: list, show, download, upload, delete, cancel, retry."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from mechint.server import library
from mechint.server.answers import DeletedOut, JobOut, MessageOut, ModelHintOut, SAEList, SAEOut, UploadOut
from mechint.server.library import Service
from mechint.server.model_table import hint
from mechint.server.models import SOURCES, STATUSES
from mechint.server.routes.shared import SaeIdOf, ServiceOf, errors, repo_url
from mechint.server.schemas import DeleteRequest, DownloadRequest, RetryRequest, UploadRequest, plain
from mechint.server.unchanged import Unchanged

router = APIRouter(tags=["saes"])


def _one_of(*values: str) -> dict[str, Any]:
    """The document names the values; what else comes is told by the library, as a 400."""
    return {"json_schema_extra": {"enum": list(values)}}


Text = r"^[^\x00-\x1f\x7f]*$"


@router.get(
    "",
    response_model=SAEList,
    responses=errors(400),
    summary="The SAEs of the library",
)
async def list_saes(
    request: Request,
    service: ServiceOf,
    skip: Annotated[int, Query(ge=0, le=10**9)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
    search: Annotated[
        str | None, Query(max_length=255, pattern=Text, description="Part of a name, description, model or repository.")
    ] = None,
    source: Annotated[str | None, Query(max_length=32, **_one_of(*SOURCES))] = None,
    status: Annotated[
        str | None, Query(max_length=32, **_one_of(*(name for name in STATUSES if name != "deleted")))
    ] = None,
    model_name: Annotated[str | None, Query(max_length=255, pattern=Text)] = None,
    sort_by: Annotated[str, Query(max_length=32, **_one_of(*library.SORTS))] = "created_at",
    order: Annotated[str, Query(max_length=8, **_one_of("asc", "desc"))] = "desc",
) -> Response:
    asked = {
        "skip": skip,
        "limit": limit,
        "search": search or None,
        "source": source or None,
        "status": status or None,
        "model_name": model_name or None,
        "sort_by": sort_by,
        "order": order,
    }
    unchanged: Unchanged = request.app.state.unchanged
    key, mark = tuple(asked.values()), unchanged.mark()
    answer = unchanged.get(key, mark)
    if answer is None:
        answer = await run_in_threadpool(_listed, service, asked)
        unchanged.keep(key, mark, answer)
    return Response(answer, media_type="application/json")


def _listed(service: Service, asked: dict[str, Any]) -> bytes:
    with service.db.read() as session:
        page = library.list_saes(session, **asked)
    more = asked["skip"] + len(page.items) < page.total
    pagination = {"skip": asked["skip"], "limit": asked["limit"], "total": page.total, "has_more": more}
    listed = SAEList.model_validate({"data": page.items, "pagination": pagination}, from_attributes=True)
    return listed.model_dump_json().encode()


@router.get("/model-hint", response_model=ModelHintOut, responses=errors(), summary="Models of a width")
async def model_hint(
    d_model: Annotated[int, Query(ge=1, le=10**6, description="Width of the residual stream.", examples=[768])],
) -> dict[str, Any]:
    """Which models an SAE of this width may belong to. A hint: most widths belong to several models."""
    found = hint(d_model)
    return found._asdict() | {"candidates": list(found.candidates)}


@router.post(
    "/download",
    response_model=SAEOut,
    status_code=202,
    responses=errors(400, 409),
    summary="Download an SAE from the Hub",
)
def download(asked: DownloadRequest, service: ServiceOf) -> Any:
    """Queues the download; progress is on the channel `sae/{id}/download`. The SAE is converted when it has arrived,
    and its original files are kept."""
    sae, _ = library.create_download(service, **plain(asked))
    return sae


@router.post(
    "/upload",
    response_model=UploadOut,
    status_code=202,
    responses=errors(400, 404, 409),
    summary="Upload an SAE to the Hub",
)
def upload(asked: UploadRequest, service: ServiceOf) -> dict[str, Any]:
    """Queues the upload in the community standard's layout; progress is on the channel `sae/{id}/upload`."""
    job = library.create_upload(service, **plain(asked))
    return {
        "sae_id": asked.sae_id,
        "repo_id": asked.repo_id,
        "filepath": asked.filepath,
        "url": repo_url(asked.repo_id, asked.filepath),
        "commit_hash": None,
        "job_id": job.id,
        "status": "pending",
    }


@router.post("/delete", response_model=DeletedOut, responses=errors(), summary="Delete several SAEs with their files")
def delete_several(asked: DeleteRequest, service: ServiceOf) -> dict[str, Any]:
    found = library.delete_saes(service, list(dict.fromkeys(asked.sae_ids)))
    message = f"Deleted {len(found.deleted_ids)} of {len(found.deleted_ids) + len(found.failed_ids)} SAEs"
    return {
        "deleted_count": len(found.deleted_ids),
        "failed_count": len(found.failed_ids),
        "deleted_ids": found.deleted_ids,
        "failed_ids": found.failed_ids,
        "errors": found.errors,
        "message": message,
    }


@router.get("/{sae_id}", response_model=SAEOut, responses=errors(404), summary="One SAE")
def get_sae(sae_id: SaeIdOf, service: ServiceOf) -> Any:
    with service.db.read() as session:
        return library.get_sae(session, sae_id)


@router.delete("/{sae_id}", response_model=MessageOut, responses=errors(404, 409), summary="Delete an SAE")
def delete(sae_id: SaeIdOf, service: ServiceOf, delete_files: bool = True) -> dict[str, str]:
    """Takes it out of the library, cancels its jobs, and removes its files."""
    library.delete_sae(service, sae_id, delete_files=delete_files)
    return {"message": f"SAE {sae_id} deleted" + ("" if delete_files else "; its files are kept")}


@router.post(
    "/{sae_id}/cancel", response_model=list[JobOut], responses=errors(404, 409), summary="Cancel the work on an SAE"
)
def cancel(sae_id: SaeIdOf, service: ServiceOf) -> Any:
    return library.cancel(service, sae_id=sae_id)


@router.post(
    "/{sae_id}/retry",
    response_model=JobOut,
    status_code=202,
    responses=errors(400, 404, 409),
    summary="Try a failed download, import or upload again",
)
def retry(sae_id: SaeIdOf, service: ServiceOf, asked: RetryRequest | None = None) -> Any:
    token = asked.access_token.get_secret_value() if asked is not None and asked.access_token else None
    return library.retry(service, sae_id, access_token=token)
