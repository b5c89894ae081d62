"""An SAE to the Hub as a bundle: its card, its metadata, its weights and their hashes."""

from typing import Any

from fastapi import APIRouter

from mechint.server.answers import UploadOut
from mechint.server.publishing import create_publish
from mechint.server.routes.shared import SaeIdOf, ServiceOf, errors, repo_url
from mechint.server.schemas import PublishRequest, plain

router = APIRouter(tags=["publish"])


@router.post(
    "/{sae_id}/publish",
    response_model=UploadOut,
    status_code=202,
    responses=errors(404, 409),
    summary="Publish an SAE as a bundle",
)
def publish(sae_id: SaeIdOf, asked: PublishRequest, service: ServiceOf) -> dict[str, Any]:
    """Queues the publication of a run's SAE (or of one in SAELens's layout) as a repository of its own; progress is on
    the channel `sae/{id}/upload`."""
    job = create_publish(service, sae_id=sae_id, **plain(asked))
    return {
        "sae_id": sae_id,
        "repo_id": asked.repo_id,
        "filepath": ".",
        "url": repo_url(asked.repo_id),
        "commit_hash": None,
        "job_id": job.id,
        "status": "pending",
    }
