"""`pull`: a whole repository of the Hub as a folder, which appears when every file is there and checked."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mechint.errors import MechintError, one_line
from mechint.hub.bundle import METADATA
from mechint.hub.fetch import stated_hashes
from mechint.huggingface.client import (
    check_repo_id,
    clean_client_log,
    hub_api,
    hub_endpoint,
    hub_errors,
    patiently,
    resolve_revision,
    tree,
)
from mechint.provenance import check_output_path, disk_full, fsync_dir, make_dir, read_json, sha256_file
from mechint.saelens.releases import is_inside

# The Hub's own housekeeping.
LEFT_OUT = ".gitattributes"
# Room that a download leaves on the disk (bytes).
SPARE_ROOM = 64 << 20


@dataclass(frozen=True)
class Pulled:
    """A repository as a folder.

    Attributes:
        commit: which one it is.
        kind: of the bundle, as its bundle_metadata.json says; None without one.
        sizes: bytes of each file, by name.
        verified: names of the files that were held to the SHA-256 in bundle_metadata.json; all of them, and the others
            too, were held to what the Hub says of the commit.
        changed: False if the folder was there already, whole.
    """

    folder: Path
    commit: str
    kind: str | None
    sizes: dict[str, int]
    verified: tuple[str, ...]
    changed: bool


def pull(repo_id: str, output: str | Path | None = None, *, revision: str | None = None) -> Pulled:
    """Download a repository into the folder `output`, by default its name in the current folder.

    Files arrive in a hidden folder beside `output`, which becomes `output` at the end. When interrupted, the same call
    goes on from there.

    Raises:
        MechintError: no such repository or revision, no network, no room, an `output` that holds something else, a file
            that is not what the Hub or bundle_metadata.json says, or names that would lead out of the folder.
    """
    check_repo_id(repo_id)
    output = Path(output) if output is not None else Path(repo_id.split("/")[1])
    if output.exists() and not output.is_dir():
        raise MechintError(f"{output} is a file: give another --output")
    commit = resolve_revision(repo_id, revision)
    with hub_errors("listing the files of", repo_id):
        entries = patiently(f"listing {repo_id}", lambda: tree(hub_api(), repo_id, commit))
    entries = {name: entry for name, entry in sorted(entries.items()) if name != LEFT_OUT}
    for name in entries:
        if not is_inside(name):
            raise MechintError(f"{repo_id} has a file {name!r}, whose name leads out of its folder: not pulled")
    if output.is_dir() and any(output.iterdir()):
        if any(_problem(output / name, entry) for name, entry in entries.items()):
            raise MechintError(
                f"{output} exists and is not {repo_id} at {commit[:12]}: give another --output, or move it away"
            )
        return _pulled(output, commit, entries, changed=False)
    check_output_path(output.parent / "any file")
    stage = output.parent / f".{output.name}.{commit[:12]}.part"
    make_dir(stage / "files")
    make_dir(stage / "parts")
    _check_room(stage, entries)
    with _alone(stage):
        for name, entry in entries.items():
            _download(repo_id, name, commit, entry, stage)
        try:
            done = _pulled(stage / "files", commit, entries, changed=True)
        except MechintError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        return replace(done, folder=_finished(stage, output))


@contextlib.contextmanager
def _alone(stage: Path) -> Iterator[None]:
    """While the block runs, no other process downloads into the same hidden folder."""
    import fcntl

    with open(stage / "lock", "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise MechintError(f"another process is pulling into {stage}: wait for it, or stop it") from None
        except OSError:
            pass  # a file system without locks
        yield


def _download(repo_id: str, name: str, commit: str, entry: Any, stage: Path) -> None:
    """One file, from the byte where an earlier attempt stopped; it gets its name when it is what the Hub lists."""
    place, part = stage / "files" / name, stage / "parts" / hashlib.sha256(name.encode()).hexdigest()[:16]
    if _problem(place, entry) is None:
        return
    make_dir(place.parent)
    for _ in range(2):
        with clean_client_log(), hub_errors(f"downloading {name} from", repo_id):
            patiently(f"downloading {name}", lambda: _append(repo_id, name, commit, entry, part))
        if (problem := _problem(part, entry)) is None:
            os.replace(part, place)
            return
        part.unlink()
    raise MechintError(f"{name} of {repo_id} arrived damaged, twice ({problem}): run the same command again")


def _append(repo_id: str, name: str, commit: str, entry: Any, part: Path) -> None:
    """What is missing of the file. (The library's own download begins each file anew in every process.)"""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo_id, name, revision=commit, endpoint=hub_endpoint())
    location = get_hf_file_metadata(url, endpoint=hub_endpoint()).location
    headers = build_hf_headers(library_name="mechint")
    if urlsplit(location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the storage's address is signed; the token is for the Hub only
    with open(part, "ab") as file:
        if entry.lfs is None or file.tell() > entry.size:
            file.truncate(0)
        http_get(
            location,
            file,
            resume_size=os.fstat(file.fileno()).st_size,
            headers=headers,
            expected_size=entry.size,
            displayed_filename=name,
        )


def _problem(path: Path, entry: Any) -> str | None:
    """Why the file is not the one that the Hub lists; None if it is."""
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry.size:
        return f"{path.stat().st_size} bytes in place of {entry.size}"
    if entry.lfs is not None:
        same = sha256_file(path) == entry.lfs.sha256
    else:  # small ones are known as git knows them
        same = hashlib.sha1(b"blob %d\0" % entry.size + path.read_bytes()).hexdigest() == entry.blob_id
    return None if same else "another hash"


def _pulled(folder: Path, commit: str, entries: dict[str, Any], *, changed: bool) -> Pulled:
    """What lies in the folder, of files that are as the Hub lists them.

    Raises:
        MechintError: a file that is not what bundle_metadata.json says.
    """
    bundle = read_json(folder / METADATA, METADATA) if METADATA in entries else {}
    stated = stated_hashes(bundle, METADATA)
    for name, sha256 in stated.items():
        if name not in entries:
            raise MechintError(
                f"{METADATA} lists {name}, which is not in the repository: it is not whole; nothing kept"
            )
        lfs = entries[name].lfs
        if (lfs.sha256 if lfs is not None else sha256_file(folder / name)) != sha256:
            raise MechintError(
                f"{name} is not what {METADATA} says (SHA-256 {sha256[:12]} is stated): it was changed after it was"
                " published; nothing kept; ask its owner, or give another --revision"
            )
    kind = bundle.get("kind")
    sizes = {name: entry.size for name, entry in entries.items()}
    return Pulled(folder, commit, kind if isinstance(kind, str) else None, sizes, tuple(sorted(stated)), changed)


def _check_room(stage: Path, entries: dict[str, Any]) -> None:
    there = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    needed = sum(entry.size for entry in entries.values()) - there + SPARE_ROOM
    free = shutil.disk_usage(stage).free
    if needed > free:
        raise disk_full(stage, f"{needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")


def _finished(stage: Path, output: Path) -> Path:
    """Move the files to their place, and the hidden folders of this and of older downloads away."""
    files = stage / "files"
    for path in files.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    try:
        os.rename(files, output)
    except OSError as error:
        raise MechintError(
            f"{files} cannot become {output} ({one_line(error.strerror or error)}): does another process write it?"
        ) from error
    fsync_dir(output.parent)
    for other in output.parent.glob(f".{output.name}.*.part"):
        shutil.rmtree(other, ignore_errors=True)
    return output
