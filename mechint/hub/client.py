"""The one way to the Hugging Face Hub: the client, downloads, waiting, and failures as errors that say what to do."""

import contextlib
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from mechint.errors import MechintError, nearest, one_line
from mechint.provenance import disk_full, disk_full_reason

Result = TypeVar("Result")
TOKENS_PAGE = "https://huggingface.co/settings/tokens"
# One look decides whether the Hub can be reached (seconds).
REACH_TIMEOUT = 10
# Rate limits are waited for, up to this long in one call (seconds). The Hub counts in windows of five minutes.
LONGEST_WAIT = 3600
# Times that a call is made when the Hub fails or the connection breaks.
ATTEMPTS = 4


def hub_api(token: str | None = None, endpoint: str | None = None) -> Any:
    """A `huggingface_hub.HfApi`. Without `token` it uses HF_TOKEN or what `hf auth login` saved, and keeps neither."""
    from huggingface_hub import HfApi

    return HfApi(token=token, endpoint=hub_endpoint(endpoint), library_name="mechint")


def hub_endpoint(endpoint: str | None = None) -> str:
    """The address of the Hub: as given, else HF_ENDPOINT, else the public one."""
    return (endpoint or os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_url(repo_id: str, repo_type: str = "model", endpoint: str | None = None) -> str:
    """The address of a repository. Needs neither the network nor the client library."""
    return f"{hub_endpoint(endpoint)}/{'' if repo_type == 'model' else repo_type + 's/'}{repo_id}"


def check_repo_id(repo_id: str) -> str:
    """`repo_id` if the Hub could accept it as owner/name. Raises `MechintError` otherwise. No network."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise MechintError(f"the Hub does not allow the repository name {repo_id!r}: {one_line(error, 200)}") from None
    if repo_id.count("/") != 1:
        raise MechintError(f"repository {repo_id!r}: expected owner/name, for example myorg/{repo_id.strip('/')}")
    return repo_id


# ---- failures


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
        if _is_ours(error):
            raise
        raise _explain(error, what, repo, token) from None


def _is_ours(error: BaseException) -> bool:
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


def _explain(error: Exception, what: str, repo: str | None, token: str | None) -> MechintError:
    from huggingface_hub import errors

    where = f" {repo}" if repo else ""
    said = one_line(without_tokens(getattr(error, "server_message", None) or error, token), 240)
    status = status_of(error)
    if (reason := disk_full_reason(error)) is not None:
        from huggingface_hub.constants import HF_HUB_CACHE

        return disk_full(HF_HUB_CACHE, reason)
    if isinstance(error, errors.LocalTokenNotFoundError):
        return MechintError(f"{what}{where}: not logged in to the Hub: {_login('a write token')}")
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
            f"{what}{where}: the Hub refuses {_which_token(token)}: expired or revoked; {_login('one')}"
        )
    if status == 402:
        return MechintError(f"{what}{where}: the account's plan or storage does not allow it: {said}")
    if status == 403:
        owner = repo.split("/")[0] if repo and "/" in repo else "its owner"
        return MechintError(
            f"{what}{where}: {_which_token(token)} has no write access to {owner} ({said}): make a token with write"
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


def _which_token(token: str | None) -> str:
    if token is not None:
        return "the given token"
    return "the token in HF_TOKEN" if os.environ.get("HF_TOKEN") else "the saved token"


def _login(which: str) -> str:
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


# ---- who is logged in


@functools.lru_cache(maxsize=16)
def _whoami(token: str | None, endpoint: str | None) -> dict[str, Any]:
    # Asked once: the Hub limits this question strictly. The token is part of the key, in memory only.
    return patiently("asking who is logged in", hub_api(token, endpoint).whoami)


def check_may_write(repo_id: str, *, token: str | None = None, endpoint: str | None = None) -> str:
    """The name of the user, after making sure that they are logged in and may write to the owner of `repo_id`.

    Raises:
        MechintError: no token, one that expired or may only read, or an owner that is neither the user nor an
            organisation where they may write. What only the Hub knows shows later.
    """
    from huggingface_hub import get_token

    owner, name = check_repo_id(repo_id).split("/")
    with hub_errors("publishing to", repo_id, token):
        me = _whoami(token or get_token(), endpoint)
    user = str(me.get("name", ""))
    organisations = {str(org.get("name")): str(org.get("roleInOrg", "")) for org in me.get("orgs") or []}
    access = (me.get("auth") or {}).get("accessToken") or {}
    which = _which_token(token)
    if me.get("type", "user") != "user":
        return user  # a token of a program (an app, a trusted publisher): only the Hub knows what it may do
    if access.get("role") == "read":
        raise MechintError(f"publishing to {repo_id}: {which} may only read: {_login('one with write access')}")
    if owner != user and owner not in organisations:
        known = f"your organisations: {', '.join(sorted(organisations))}" if organisations else "no organisations"
        raise MechintError(
            f"{repo_id} belongs to {owner}, and you are logged in as {user} ({known}): publish to {user}/{name}, or ask"
            f" {owner} for write access and run `hf auth login` with a token that has it"
        )
    if organisations.get(owner) in ("read", "no_access"):
        raise MechintError(
            f"publishing to {repo_id}: you ({user}) may only read in the organisation {owner}: ask its administrators"
            f" for the role 'contributor' or 'write', or publish to {user}/{name}"
        )
    if access.get("role") == "fineGrained":
        scopes = (access.get("fineGrained") or {}).get("scoped") or []
        rights = {
            right
            for scope in scopes
            if (scope.get("entity") or {}).get("name") in (owner, repo_id)
            for right in scope.get("permissions") or []
        }
        if "repo.write" not in rights:
            raise MechintError(
                f"publishing to {repo_id}: {which} has no write access to the repositories of {owner}: give it that at"
                f" {TOKENS_PAGE} (edit permissions), or run `hf auth login` with another token"
            )
    return user


# ---- reading


def resolve_revision(
    repo_id: str,
    revision: str | None = None,
    *,
    repo_type: str = "model",
    cache_dir: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """The commit that `revision` (a branch, a tag, a commit; None: main) stands for.

    When the Hub cannot be reached it is the commit that was downloaded last under that name.

    Raises:
        MechintError: no such repository or revision, no access, or neither the Hub nor a download.
    """
    check_repo_id(repo_id)
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    api = hub_api(token, endpoint)
    try:
        info = api.repo_info(repo_id, repo_type=repo_type, revision=revision, timeout=REACH_TIMEOUT)
        return str(info.sha)
    except Exception as error:
        status = status_of(error)
        if status is not None and status < 500 and status != 429:
            raise _explain(error, "reading", repo_id, token) from None
        saved = _cache(repo_id, repo_type, cache_dir) / "refs" / (revision or "main")
        if saved.is_file():
            return saved.read_text(encoding="utf-8").strip()
        raise _explain(error, "reading", repo_id, token) from None


def list_files(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    cache_dir: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> dict[str, int]:
    """The files of a repository at a revision and their sizes in bytes; when offline, those in the local cache.

    Raises:
        MechintError: as `resolve_revision`.
    """
    commit = resolve_revision(
        repo_id, revision, repo_type=repo_type, cache_dir=cache_dir, token=token, endpoint=endpoint
    )
    api = hub_api(token, endpoint)
    try:
        return {name: entry.size for name, entry in tree(api, repo_id, commit, repo_type).items()}
    except Exception as error:
        folder = _cache(repo_id, repo_type, cache_dir) / "snapshots" / commit
        status = status_of(error)
        if folder.is_dir() and (status is None or status >= 500):
            found = (path for path in sorted(folder.rglob("*")) if path.is_file())
            return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        if _is_ours(error):
            raise
        raise _explain(error, "listing the files of", repo_id, token) from None


def tree(api: Any, repo_id: str, revision: str, repo_type: str = "model") -> dict[str, Any]:
    """Every file of a revision as the client's RepoFile (size, blob_id, lfs), by name. Errors are the client's."""
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision, repo_type=repo_type)
    return {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def download(
    repo_id: str,
    file: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    cache_dir: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """One file of a repository, in the local cache. Works from the cache when the Hub cannot be reached.

    Raises:
        MechintError: a file name that leads out, no such file (those like it are named), no access, no network.
    """
    from huggingface_hub import errors, hf_hub_download

    check_repo_id(repo_id)
    if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts or "\\" in file:
        raise MechintError(f"{file!r} should be a path inside {repo_id}, without '..' or a leading '/'")
    where: dict[str, Any] = {"revision": revision, "repo_type": repo_type, "cache_dir": cache_dir}
    with clean_client_log(), hub_errors(f"downloading {file} from", repo_id, token):
        try:
            path = patiently(
                f"downloading {file}",
                lambda: hf_hub_download(repo_id, file, token=token, endpoint=hub_endpoint(endpoint), **where),
                attempts=1,  # the client tries again by itself
            )
        except errors.RemoteEntryNotFoundError:
            names = list_files(repo_id, token=token, endpoint=endpoint, **where)
            raise MechintError(f"{repo_id} has no file {file!r}; {nearest(file, names)}") from None
    return Path(path)


def _cache(repo_id: str, repo_type: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE, f"{repo_type}s--{repo_id.replace('/', '--')}")
