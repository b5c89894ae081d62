"""Failures of the Hub: as one line that says what to do, without tokens; and waiting for those that pass."""

import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mechint.errors import MechintError, one_line
from mechint.provenance import disk_full, disk_full_reason

Result = TypeVar("Result")
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# Rate limits are waited for, up to this long in one call (seconds). The Hub counts in windows of five minutes.
LONGEST_WAIT = 3600
# Times that a call is made when the Hub fails or the connection breaks.
ATTEMPTS = 4


@contextlib.contextmanager
def hub_errors(what: str, repo: str | None = None, token: str | None = None) -> Iterator[None]:
    """Turn every failure of the Hub client inside the block into a `MechintError`; no token is in its text.

    `what` begins the sentence: "uploading", "downloading cfg.json".
    """
    try:
        yield
    except MechintError:
        raise
    except Exception as error:  # the HTTP library's classes differ between major versions of huggingface_hub
        if is_ours(error):
            raise
        raise explain(error, what, repo, token) from None


def is_ours(error: BaseException) -> bool:
    """Whether a mistake in this package raised an error, which must then keep its traceback."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return module.startswith("mechint") and not isinstance(error, OSError)


def without_tokens(text: object, token: str | None = None) -> str:
    """`text` with every access token in it replaced, and signed addresses cut before their signature."""
    shown = str(text)
    for secret in {token, *_known_tokens()}:
        if secret:
            shown = shown.replace(secret, "***")
    shown = re.sub(r"\b(hf_|api_org_)[A-Za-z0-9]{8,}", r"\1***", shown)
    shown = re.sub(r"(?i)\bbearer\s+\S+", "Bearer ***", shown)
    return re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", shown)


def _known_tokens() -> set[str]:
    found = {os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")}
    with contextlib.suppress(Exception):  # an unreadable token file must not hide the error that is being told
        from huggingface_hub import constants

        found.add(Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip())
    return {token for token in found if len(token) > 3}


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status behind an error, also where the client wraps it in errors of its own."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _response(error: BaseException | None) -> Any:
    while error is not None:
        if (response := getattr(error, "response", None)) is not None and hasattr(response, "status_code"):
            return response
        error = error.__cause__ or error.__context__
    return None


def is_broken_connection(error: BaseException | None) -> bool:
    """Whether the network, and not the Hub, is behind an error."""
    if _response(error) is not None:
        return False
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, OfflineModeIsEnabled | HFValidationError):
            return False
        # httpx or httpx2, by the version of huggingface_hub
        if isinstance(error, ConnectionError | TimeoutError) or type(error).__module__.startswith("httpx"):
            return True
        error = error.__cause__ or error.__context__
    return False


def explain(error: Exception, what: str, repo: str | None, token: str | None) -> MechintError:
    from huggingface_hub import errors

    where = f" {repo}" if repo else ""
    said = one_line(without_tokens(getattr(error, "server_message", None) or error, token), 240)
    status = status_of(error)
    if (reason := disk_full_reason(error)) is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        return disk_full(HF_HUB_CACHE, reason)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return MechintError(f"{what}{where}: not logged in to the Hub: {how_to_log_in('a write token')}")
    if isinstance(error, errors.HFValidationError):
        return MechintError(f"the Hub does not allow this name: {said}")
    if isinstance(error, errors.OfflineModeIsEnabled):
        return MechintError(f"{what}{where}: HF_HUB_OFFLINE is set; unset it to reach the Hub")
    if isinstance(error, errors.GatedRepoError):
        return MechintError(f"{repo} is gated: accept its terms on its page on the Hub and run `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return MechintError(f"{repo} has no such revision: leave --revision out for the newest")
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return MechintError(f"{what}: {repo} has no such file at this revision")
    if isinstance(error, errors.RepositoryNotFoundError):
        return MechintError(
            f"{what}: {repo or 'the repository'} is not on the Hub, or is private and the token may not see it"
            " (then run `hf auth login`)"
        )
    if isinstance(error, errors.LocalEntryNotFoundError) or is_broken_connection(error):
        return MechintError(
            f"{what}{where}: the Hub cannot be reached, or the connection broke: check the network (and HF_ENDPOINT)"
            " and run the same command again"
        )
    if status == 401:
        return MechintError(
            f"{what}{where}: the Hub refuses {which_token(token)}: expired or revoked; {how_to_log_in('one')}"
        )
    if status == 402:
        return MechintError(f"{what}{where}: the account's plan or storage does not allow it: {said}")
    if status == 403:
        owner = repo.split("/")[0] if repo and "/" in repo else "its owner"
        return MechintError(
            f"{what}{where}: {which_token(token)} has no write access to {owner} ({said}): make a token with write"
            f" access to {owner} at {TOKENS_PAGE}, then run `hf auth login`"
        )
    if status == 412:
        return MechintError(f"{what}{where}: somebody else's commit came between: run the same command again")
    if status == 429:
        return MechintError(f"{what}{where}: the Hub's rate limit holds for longer than an hour: try again later")
    if "Invalid metadata in README.md" in said:
        return MechintError(f"{what}{where}: the Hub does not accept the front matter of README.md: {said}")
    if status is not None and status >= 500:
        return MechintError(
            f"{what}{where}: the Hub failed (status {status}) each of {ATTEMPTS} times: try again later"
        )
    if status is not None:
        return MechintError(f"{what}{where}: the Hub refused it (status {status}): {said}")
    if isinstance(error, KeyError | TypeError | AttributeError):
        return MechintError(f"{what}{where}: the Hub's answer cannot be read ({type(error).__name__}: {said})")
    return MechintError(f"{what}{where} failed: {said}")


def which_token(token: str | None) -> str:
    if token is not None:
        return "the given token"
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved token"


def how_to_log_in(which: str) -> str:
    unset = " (unset HF_TOKEN first: it goes before the saved token)" if os.environ.get("HF_TOKEN") else ""
    return f"make {which} at {TOKENS_PAGE}, then run `hf auth login`{unset}"


# ---- waiting


def patiently(what: str, call: Callable[[], Result], attempts: int = ATTEMPTS) -> Result:
    """What `call` returns; rate limits are waited for, and it is called again when the Hub or the connection fails.

    Only for calls that may be made twice. What is waited for is told on standard error. Errors stay the client's own.
    """
    failures, waited = 0, 0.0
    while True:
        try:
            return call()
        except Exception as error:
            status = status_of(error)
            if status == 429:
                seconds = _asked_to_wait(error)
                if waited + seconds > LONGEST_WAIT:
                    raise
                reason = "the Hub's rate limit is reached"
            elif is_broken_connection(error) or (status or 0) in (408, 500, 502, 503, 504) or _unreadable(error):
                failures += 1
                if failures >= attempts:
                    raise
                seconds = float(2**failures)
                reason = f"the Hub failed (status {status})" if status else "the connection broke"

            else:
                raise
        wait(f"{what}: {reason}", seconds)
        waited += seconds


def _asked_to_wait(error: Exception) -> float:
    """Seconds until a rate limit ends, as the Hub's headers say; a minute if they do not."""
    headers = {str(name).lower(): str(value) for name, value in _response(error).headers.items()}
    if found := re.search(r";\s*t=(\d+)", headers.get("ratelimit", "")):
        return float(found[1]) + 1
    after = headers.get("retry-after", "").strip()
    return float(after) + 1 if after.isdigit() else 60.0


def _unreadable(error: Exception) -> bool:
    """An answer that should be JSON and is not: a page of a proxy or of a failing server."""
    return type(error).__name__ == "JSONDecodeError"


def wait(why: str, seconds: float) -> None:
    """Sleep, and show on standard error why and for how long."""
    from tqdm import tqdm

    print(f"{why}; going on in {seconds:.0f} s", file=sys.stderr, flush=True)
    # None: the bar is shown on a terminal only; the line above is enough in a log
    with tqdm(total=round(seconds), desc="waiting", unit="s", leave=False, disable=None) as bar:
        while seconds > 0:
            time.sleep(min(1.0, seconds))
            seconds -= 1.0
            bar.update(1)


@contextlib.contextmanager
def clean_client_log() -> Iterator[None]:
    """While the block runs, what the client says of its retries is told in our words, without tokens or addresses."""
    from tqdm import tqdm

    def retell(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if found := re.search(r"(Rate limited\. Waiting|Retrying in) ([\d.]+)s", text):
            limited = found[1].startswith("Rate")
            reason = "the Hub's rate limit is reached" if limited else "the Hub failed or the connection broke"
            tqdm.write(f"{reason}; going on in {float(found[2]):.0f} s", file=sys.stderr)
            return False
        record.msg, record.args = without_tokens(text), None
        return "thrown while requesting" not in text

    logger = logging.getLogger("huggingface_hub.utils._http")
    logger.addFilter(retell)
    try:
        yield
    finally:
        logger.removeFilter(retell)
