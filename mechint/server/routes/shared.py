"""What all routes use: the service of this process, ids that can be looked up, and the errors in the documents."""

import os
import re
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, Path, Request

from mechint.server.answers import ErrorOut, InvalidOut
from mechint.server.errors import job_not_found, sae_not_found
from mechint.server.library import Service
from mechint.server.schemas import SAE_ID_PATTERN
from mechint.server.settings import Settings


# These wait for nothing; as plain functions each would be sent to a thread of its own.
async def _service(request: Request) -> Service:
    return request.app.state.service


async def _settings(request: Request) -> Settings:
    return request.app.state.settings


async def _sae_id(sae_id: Annotated[str, Path(description="Id of an SAE.", examples=["sae_0123456789ab"])]) -> str:
    """What cannot be an id is not looked up: databases do not take every string."""
    if not re.fullmatch(SAE_ID_PATTERN, sae_id):
        raise sae_not_found(sae_id[:64])
    return sae_id


async def _job_id(job_id: Annotated[str, Path(description="Id of a job.", examples=["job_0123456789ab"])]) -> str:
    if not re.fullmatch(r"job_[0-9a-f]{12}", job_id):
        raise job_not_found(job_id[:64])
    return job_id


ServiceOf = Annotated[Service, Depends(_service)]
SettingsOf = Annotated[Settings, Depends(_settings)]
SaeIdOf = Annotated[str, Depends(_sae_id)]
JobIdOf = Annotated[str, Depends(_job_id)]


def repo_url(repo_id: str, filepath: str | None = None) -> str:
    """Where people will find it on the Hub."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if filepath is None:
        return f"{endpoint}/{repo_id}"
    return f"{endpoint}/{repo_id}/tree/main/{'' if filepath == '.' else quote(filepath)}".rstrip("/")


_TELLS = {
    400: "What was asked makes no sense here",
    401: "An API key is needed",
    403: "Not allowed: of another site, without the rights on the Hub, or outside the folders that are allowed",
    404: "Not found",
    409: "Not possible in the present state",
    413: "The request is too large",
    429: "Rate limit exceeded; Retry-After says how long to wait",
    502: "The Hub cannot be reached, or fails",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these, those that every route has, and 422."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorOut, "description": _TELLS[status]} for status in sorted({400, 401, 403, *statuses})
    }
    found[422] = {"model": InvalidOut, "description": "A field of the request, or a file, is not as it should be"}
    if 429 in found:
        found[429]["headers"] = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer"}}}
    return found
