"""The one way to the Hugging Face Hub: who is logged in and may write where, revisions, listings, downloads.

What goes wrong is told by `failures`, which is part of the way: import it from here.
"""

import functools
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mechint.errors import MechintError, nearest, one_line
from mechint.huggingface.failures import (
    ATTEMPTS,
    LONGEST_WAIT,
    TOKENS_PAGE,
    clean_client_log,
    explain,
    how_to_log_in,
    hub_errors,
    is_broken_connection,
    is_ours,
    patiently,
    status_of,
    wait,
    which_token,
    without_tokens,
)

__all__ = [
    "ATTEMPTS",
    "LONGEST_WAIT",
    "check_may_write",
    "check_repo_id",
    "clean_client_log",
    "download",
    "hub_api",
    "hub_endpoint",
    "hub_errors",
    "hub_url",
    "is_broken_connection",
    "list_files",
    "patiently",
    "resolve_revision",
    "status_of",
    "tree",
    "wait",
    "without_tokens",
]
# One look decides whether the Hub can be reached (seconds).
REACH_TIMEOUT = 10


def hub_api(token: str | bool | None = None, endpoint: str | None = None) -> Any:
    """A `huggingface_hub.HfApi`. Without `token` it uses HF_TOKEN or what `hf auth login` saved, and keeps neither;
    with False it uses none."""
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
    which = which_token(token)
    if me.get("type", "user") != "user":
        return user  # a token of a program (an app, a trusted publisher): only the Hub knows what it may do
    if access.get("role") == "read":
        raise MechintError(f"publishing to {repo_id}: {which} may only read: {how_to_log_in('one with write access')}")
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
            raise explain(error, "reading", repo_id, token) from None
        saved = _cache(repo_id, repo_type, cache_dir) / "refs" / (revision or "main")
        if saved.is_file():
            return saved.read_text(encoding="utf-8").strip()
        raise explain(error, "reading", repo_id, token) from None


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
        if is_ours(error):
            raise
        raise explain(error, "listing the files of", repo_id, token) from None


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
    again: bool = False,
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
                lambda: hf_hub_download(
                    repo_id, file, token=token, endpoint=hub_endpoint(endpoint), force_download=again, **where
                ),
                attempts=1,  # the client tries again by itself
            )
        except errors.RemoteEntryNotFoundError:
            names = list_files(repo_id, token=token, endpoint=endpoint, **where)
            raise MechintError(f"{repo_id} has no file {file!r}; {nearest(file, names)}") from None
    return Path(path)


def _cache(repo_id: str, repo_type: str, cache_dir: Path | None) -> Path:
    from huggingface_hub import constants

    return Path(cache_dir or constants.HF_HUB_CACHE, f"{repo_type}s--{repo_id.replace('/', '--')}")
