"""Work in progress and done."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from mechint.server import library
from mechint.server.answers import JobOut
from mechint.server.routes.shared import JobIdOf, ServiceOf, errors
from mechint.server.schemas import SAE_ID_PATTERN

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.get("", response_model=list[JobOut], responses=errors(), summary="Jobs, newest first")
def list_jobs(
    service: ServiceOf,
    sae_id: Annotated[str | None, Query(pattern=SAE_ID_PATTERN)] = None,
    live: Annotated[bool, Query(description="Only those that wait or run.")] = False,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Any:
    with service.db.read() as session:
        return library.list_jobs(session, sae_id=sae_id, live=live, limit=limit)


@router.get("/{job_id}", response_model=JobOut, responses=errors(404), summary="One job")
def get_job(job_id: JobIdOf, service: ServiceOf) -> Any:
    with service.db.read() as session:
        return library.get_job(session, job_id)


@router.post("/{job_id}/cancel", response_model=list[JobOut], responses=errors(404, 409), summary="Cancel a job")
def cancel(job_id: JobIdOf, service: ServiceOf) -> Any:
    return library.cancel(service, job_id=job_id)
