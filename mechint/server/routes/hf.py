"""What a repository of the Hub holds."""

from typing import Any

from fastapi import APIRouter

from mechint.server.answers import PreviewOut
from mechint.server.hub_preview import preview
from mechint.server.routes.shared import SettingsOf, errors
from mechint.server.schemas import PreviewRequest

router = APIRouter(prefix="/hf", tags=["hub"])


@router.post(
    "/preview", response_model=PreviewOut, responses=errors(400, 404, 429, 502), summary="Look into a repository"
)
def preview_repository(asked: PreviewRequest, settings: SettingsOf) -> dict[str, Any]:
    """Its description, files and size, the folders that hold SAEs, and their model. Downloads no weights."""
    # one user's request does not read with another's token: without its own it has the server's only where they are one
    token = asked.access_token.get_secret_value() if asked.access_token else None
    found = preview(asked.repo_id, token=token if token or settings.uses_server_token else False)
    return found._asdict() | {
        "files": [file._asdict() for file in found.files],
        "sae_files": [file._asdict() for file in found.sae_files],
    }
