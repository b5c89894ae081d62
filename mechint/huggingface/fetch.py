"""Chosen files of a repository in the local cache, all of one commit, held to the hashes that the repository states."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mechint.errors import MechintError
from mechint.huggingface.client import REACH_TIMEOUT, check_repo_id, download, hub_api
from mechint.huggingface.failures import hub_errors, is_ours, patiently, status_of
from mechint.provenance import read_json, sha256_file, write_text

# What the files of a repository of ours are, with their hashes.
METADATA = "bundle_metadata.json"
# A list of hashes is small; a file that is not must not be read as JSON.
METADATA_BYTES = 64 << 20


@dataclass(frozen=True)
class Repo:
    """One commit of a repository.

    Attributes:
        revision: as it was asked for; None for the newest.
        sizes: bytes of each of its files, by name; of those in the cache if the Hub cannot be reached.
        online: whether the Hub was reached.
    """

    repo_id: str
    revision: str | None
    commit: str
    sizes: dict[str, int]
    cache_dir: Path | None = None
    online: bool = True


@dataclass(frozen=True)
class Fetched:
    """Files that lie in the cache under their names in the repository.

    Attributes:
        folder: the cache's folder of the commit.
        bundle: what bundle_metadata.json says; empty in a repository that has none.
        verified: SHA-256 of each file that was held to the bundle's.
    """

    folder: Path
    bundle: dict[str, Any]
    verified: dict[str, str]


def is_inside(path: str) -> bool:
    """Whether a path of a repository stays in it."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\\" not in path and "\0" not in path


def split_id(given: str, what: str) -> tuple[str, str]:
    """`user/repo/path/in/it` as `("user/repo", "path/in/it")`; the path may be empty.

    Raises:
        MechintError: not of that form; `what` says what was expected instead.
    """
    parts = given.rstrip("/").split("/")
    plain = all(re.fullmatch(r"[A-Za-z0-9_][\w.-]*", part) for part in parts[:2])
    if len(parts) < 2 or not plain:
        raise MechintError(what)
    path = "/".join(parts[2:])
    if path and not is_inside(path):
        raise MechintError(f"{given!r}: the part after the repository should be a path in it, without '..'")
    return "/".join(parts[:2]), path


def open_repo(repo_id: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Repo:
    """Ask the Hub which commit `revision` is and which files it has; if it cannot be reached, ask the cache.

    Raises:
        MechintError: no such repository or revision, no access to it, or the Hub out of reach and nothing in the cache.
    """
    place = None if cache_dir is None else Path(cache_dir).expanduser()
    check_repo_id(repo_id)

    def ask() -> Any:
        # one request, asked once: without the Hub, what is in the cache should open without a wait
        return hub_api().repo_info(repo_id, revision=revision, files_metadata=True, timeout=REACH_TIMEOUT)

    with hub_errors("looking at", repo_id):
        try:
            info = ask()
        except Exception as error:
            status = status_of(error)
            if is_ours(error) or (status is not None and status < 500 and status != 429):
                raise
            if (folder := _cached_commit(repo_id, revision, place)) is not None:
                files = (path for path in sorted(folder.rglob("*")) if path.is_file())
                sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
                return Repo(repo_id, revision, folder.name, sizes, place, online=False)
            if status != 429:
                with hub_errors("nothing in the local cache; looking at", repo_id):
                    raise
            info = patiently(f"looking at {repo_id}", ask)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Repo(repo_id, revision, str(info.sha), sizes, place)


def _cached_commit(repo_id: str, revision: str | None, cache_dir: Path | None) -> Path | None:
    """The cache's folder of the commit that `revision` stood for when it was last downloaded."""
    from huggingface_hub import constants

    folder = Path(cache_dir or constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}")
    reference = folder / "refs" / (revision or "main")
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    found = folder / "snapshots" / commit if commit else None
    return found if found is not None and found.is_dir() else None


def fetch(repo: Repo, names: Iterable[str], *, again: bool = False) -> Fetched:
    """The named files and bundle_metadata.json in the cache; only what is not there is downloaded, or all `again`.

    A file whose hash differs from what the bundle states is downloaded once more, in case the cache was damaged.

    Raises:
        MechintError: a download that fails, a file that is not in the repository, or one that is not what
            bundle_metadata.json says.
    """
    wanted = sorted({*names, *({METADATA} & repo.sizes.keys())})
    if repo.sizes.get(METADATA, 0) > METADATA_BYTES:
        raise MechintError(f"{METADATA} of {repo.repo_id} is {repo.sizes[METADATA]} bytes long: not what a bundle has")
    places = {name: _download(repo, name, again=again and repo.online) for name in wanted}
    name, place = next(iter(places.items()))
    folder = place.parents[name.count("/")]
    bundle = read_json(places[METADATA], f"{METADATA} of {repo.repo_id}") if METADATA in places else {}
    stated = stated_hashes(bundle, repo.repo_id)
    for name, place in places.items():
        if name in stated and sha256_file(place) != stated[name]:
            place.resolve().unlink()
            place.unlink(missing_ok=True)
            _download(repo, name)
    verified = check_hashes(folder, wanted, bundle, f"{repo.repo_id} at {repo.commit[:12]}")
    _note_revision(repo, folder)
    return Fetched(folder, bundle, verified)


def check_hashes(folder: Path, names: Iterable[str], bundle: dict[str, Any], source: str) -> dict[str, str]:
    """SHA-256 of those of the files that are in the folder and in the bundle's list.

    Raises:
        MechintError: a file that is not what the bundle says.
    """
    stated, verified = stated_hashes(bundle, source), {}
    for name in names:
        if name not in stated or not (folder / name).is_file():
            continue
        if (found := sha256_file(folder / name)) != stated[name]:
            raise MechintError(
                f"{name} of {source} is not what {METADATA} says (SHA-256 {found[:12]}, stated {stated[name][:12]}): it"
                " was changed after it was published; ask its owner, or give another revision"
            )
        verified[name] = found
    return verified


def plain_values(said: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Those of the keys whose values are texts or numbers: what somebody else's file says, as far as it can be used."""
    return {key: said[key] for key in keys if isinstance(said.get(key), (str, int, float))}


def local_bundle(folder: Path) -> dict[str, Any]:
    """What the bundle_metadata.json of a folder says, if it has one: then it was pulled from the Hub."""
    return read_json(folder / METADATA, METADATA) if (folder / METADATA).is_file() else {}


def _download(repo: Repo, name: str, *, again: bool = False) -> Path:
    # by commit, so that all files belong together even if somebody publishes meanwhile
    return download(repo.repo_id, name, revision=repo.commit, cache_dir=repo.cache_dir, again=again)


def _note_revision(repo: Repo, folder: Path) -> None:
    """Write in the cache, where the Hub's library does, which commit the revision's name stood for: known offline."""
    name = repo.revision or "main"
    reference = folder.parent.parent / "refs" / name
    if (
        name == repo.commit
        or not is_inside(name)
        or (reference.is_file() and reference.read_text().strip() == repo.commit)
    ):
        return
    write_text(reference, repo.commit)


def stated_hashes(bundle: dict[str, Any], source: str) -> dict[str, str]:
    """SHA-256 of each file as a bundle states it; empty for a bundle that states none.

    Raises:
        MechintError: hashes in another form than `files: {name: {sha256, size}}`.
    """
    files = bundle.get("files", {})
    whole = isinstance(files, dict) and all(
        isinstance(entry, dict) and re.fullmatch(r"[0-9a-f]{64}", str(entry.get("sha256"))) for entry in files.values()
    )
    if not whole:
        raise MechintError(
            f"{METADATA} of {source}: files should hold sha256 and size of each, found {json.dumps(files)[:80]}"
        )
    return {name: str(entry["sha256"]) for name, entry in files.items()}
