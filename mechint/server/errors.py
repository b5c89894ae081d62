"""Failures of the service: a name, what was asked, what to do, and the HTTP status. Workers raise the same ones.

The first four names and remedies are those that clients of the sharing API know. The body of every error answer is
`body(error)`; the text that a job keeps is `str(error)`.
"""

import math
from typing import Any

from mechint.errors import MechintError

RETRY_AFTER_SECONDS = 60  # where the Hub does not say how long to wait
MAX_RETRY_AFTER = 24 * 3600


class ServiceError(MechintError):
    """A failure that a client is told.

    Attributes:
        code: for programs, such as `repository_not_found`.
        message: what went wrong, with what was asked.
        remedy: what to do about it, or "".
        status: of the HTTP answer.
        retry_after: seconds, where waiting helps.
        retryable: whether a job that met it should be tried again by itself.
    """

    def __init__(
        self,
        code: str,
        message: str,
        remedy: str = "",
        *,
        status: int = 400,
        retry_after: int | None = None,
        retryable: bool = False,
    ):
        super().__init__(f"{message}: {remedy}" if remedy else message)
        self.code, self.message, self.remedy, self.status = code, message, remedy, status
        self.retry_after, self.retryable = retry_after, retryable


def body(error: ServiceError) -> dict[str, Any]:
    """The JSON of an error answer; `detail` is what clients show."""
    found: dict[str, Any] = {"detail": error.message, "code": error.code, "remedy": error.remedy}
    if error.retry_after is not None:
        found["retry_after"] = error.retry_after
    return found


# --- names that the sharing API promises ------------------------------------------------------------------------------


def repository_not_found(repo_id: str) -> ServiceError:
    return ServiceError(
        "repository_not_found", f"Repository not found: {repo_id}", "check repo_id, provide access_token", status=404
    )


def config_not_found(where: str) -> ServiceError:
    return ServiceError(
        "config_not_found", f"Config file not found: {where}", "check SAE format compatibility", status=422
    )


def dimension_mismatch(model_name: str, expected: int, found: int) -> ServiceError:
    return ServiceError(
        "dimension_mismatch",
        f"Dimension mismatch: the SAE has d_model {found}, {model_name} has {expected}",
        "verify model_name matches SAE",
        status=422,
    )


def rate_limited(retry_after: int | None = None) -> ServiceError:
    seconds = RETRY_AFTER_SECONDS if retry_after is None else max(1, min(retry_after, MAX_RETRY_AFTER))
    return ServiceError(
        "rate_limited",
        "Rate limit exceeded: too many requests to the Hub",
        f"wait {seconds} seconds and retry, use access_token",
        status=429,
        retry_after=seconds,
        retryable=True,
    )


# --- the others -------------------------------------------------------------------------------------------------------


def sae_not_found(sae_id: str) -> ServiceError:
    return ServiceError("sae_not_found", f"SAE not found: {sae_id}", "GET /api/v1/saes lists what there is", status=404)


def job_not_found(job_id: str) -> ServiceError:
    return ServiceError("job_not_found", f"Job not found: {job_id}", status=404)


def not_ready(sae_id: str, status: str) -> ServiceError:
    return ServiceError(
        "not_ready", f"SAE not ready: {sae_id} is {status}", "wait until its status is ready", status=409
    )


def conflict(message: str, remedy: str = "") -> ServiceError:
    return ServiceError("conflict", message, remedy, status=409)


def bad_request(message: str, remedy: str = "") -> ServiceError:
    return ServiceError("bad_request", message, remedy)


def file_not_found(path: str) -> ServiceError:
    return ServiceError(
        "file_not_found", f"File not found: {path}", "give a path inside a folder that the server allows imports from"
    )


def path_not_found(repo_id: str, filepath: str) -> ServiceError:
    return ServiceError(
        "path_not_found",
        f"Path not found in repository: {filepath} in {repo_id}",
        "POST /api/v1/saes/hf/preview lists sae_paths",
        status=404,
    )


def revision_not_found(repo_id: str, revision: str | None) -> ServiceError:
    return ServiceError(
        "revision_not_found",
        f"Revision not found: {revision or 'main'} in {repo_id}",
        "give a branch, a tag or a commit",
        status=404,
    )


def forbidden(message: str, remedy: str = "") -> ServiceError:
    return ServiceError("forbidden", message, remedy, status=403)


def hub_failed(what: str) -> ServiceError:
    return ServiceError("hub_unavailable", what, "try again later", status=502, retryable=True)


# --- what the Hub client raises ---------------------------------------------------------------------------------------


def from_hub(error: BaseException, repo_id: str, *, revision: str | None = None, what: str = "reading") -> ServiceError:
    """What a failure of the Hub client means. None of its own text is used: it may hold signed addresses.

    `what` is the work in one word, such as "uploading to".
    """
    from huggingface_hub import errors as hub

    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status == 429:
        return rate_limited(retry_after(getattr(response, "headers", None)))
    if isinstance(error, hub.GatedRepoError):
        return forbidden(
            f"Repository is gated: {repo_id}",
            "accept its terms on the Hub, then provide that account's access_token",
        )
    if isinstance(error, hub.RepositoryNotFoundError):
        return repository_not_found(repo_id)
    if isinstance(error, hub.RevisionNotFoundError):
        return revision_not_found(repo_id, revision)
    if isinstance(error, hub.HFValidationError):
        return bad_request(f"Not a repository name: {repo_id}", "give it as user/name")
    if isinstance(error, hub.OfflineModeIsEnabled):
        return hub_failed(f"{what} {repo_id}: the server runs with HF_HUB_OFFLINE=1")
    if status == 401:
        return forbidden("The Hub does not accept this access_token", "make a new one and provide it")
    if status == 403:
        return forbidden(
            f"The Hub does not allow {what} {repo_id} with this access_token", "provide one with the rights to do so"
        )
    if status == 404:
        return repository_not_found(repo_id)
    if isinstance(status, int):
        return hub_failed(f"{what} {repo_id}: the Hub answered {status}")
    return hub_failed(f"{what} {repo_id}: the Hub could not be reached ({type(error).__name__})")


def retry_after(headers: Any) -> int | None:
    """Seconds that an answer asks to wait: of Retry-After (seconds or a date), or of RateLimit's `t=`."""
    import datetime
    import email.utils
    import re

    value = (headers or {}).get("retry-after")
    if value:
        try:
            return max(1, math.ceil(float(value)))
        except (ValueError, OverflowError):
            pass
        try:
            until = email.utils.parsedate_to_datetime(value)
        except (TypeError, ValueError):
            return None
        until = until if until.tzinfo else until.replace(tzinfo=datetime.UTC)
        return max(1, math.ceil((until - datetime.datetime.now(datetime.UTC)).total_seconds()))
    found = re.search(r"\bt=(\d{1,6})\b", (headers or {}).get("ratelimit") or "")
    return int(found[1]) if found else None
