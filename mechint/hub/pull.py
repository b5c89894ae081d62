"""`pull`: a whole repository of the Hub as a folder, which appears when every file is there and checked."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mechint.errors import MechintError, one_line
from mechint.hub.bundle import METADATA
from mechint.huggingface.client import (
    check_repo_id,
    clean_client_log,
    hub_api,
    hub_errors,
    patiently,
    resolve_revision,
    tree,
)
from mechint.huggingface.fetch import is_inside, stated_hashes
from mechint.huggingface.files import Listed, difference, fetch_rest, listed, place_of
from mechint.locks import lock
from mechint.provenance import check_output_path, disk_full, fsync_dir, make_dir, read_json, sha256_file

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
    files = [listed(entry) for name, entry in sorted(entries.items()) if name != LEFT_OUT]
    for file in files:
        if not is_inside(file.path):
            raise MechintError(f"{repo_id} has a file {file.path!r}, whose name leads out of its folder: not pulled")
    if output.is_dir() and any(output.iterdir()):
        if any(difference(output / file.path, file) for file in files):
            raise MechintError(
                f"{output} exists and is not {repo_id} at {commit[:12]}: give another --output, or move it away"
            )
        return _pulled(output, commit, files, changed=False)
    check_output_path(output.parent / "any file")
    stage = output.parent / f".{output.name}.{commit[:12]}.part"
    make_dir(stage / "files")
    make_dir(stage / "parts")
    _check_room(stage, files)
    with _alone(stage):
        for file in files:
            _download(repo_id, file, commit, stage)
        try:
            done = _pulled(stage / "files", commit, files, changed=True)
        except MechintError:
            shutil.rmtree(stage, ignore_errors=True)
            raise
        return replace(done, folder=_finished(stage, output))


@contextlib.contextmanager
def _alone(stage: Path) -> Iterator[None]:
    """While the block runs, no other process downloads into the same hidden folder."""
    with open(stage / "lock", "wb") as file:
        if lock(file.fileno()) is False:
            raise MechintError(f"another process is pulling into {stage}: wait for it, or stop it")
        yield


def _download(repo_id: str, file: Listed, commit: str, stage: Path) -> None:
    """One file, from the byte where an earlier attempt stopped; it gets its name when it is what the Hub lists."""
    name = file.path
    place, part = stage / "files" / name, stage / "parts" / hashlib.sha256(name.encode()).hexdigest()[:16]
    if difference(place, file) is None:
        return
    make_dir(place.parent)
    for _ in range(2):
        with clean_client_log(), hub_errors(f"downloading {name} from", repo_id):
            patiently(f"downloading {name}", lambda: fetch_rest(place_of(repo_id, name, commit), file, part))
        if (problem := difference(part, file)) is None:
            os.replace(part, place)
            return
        part.unlink()
    raise MechintError(f"{name} of {repo_id} arrived damaged, twice ({problem}): run the same command again")


def _pulled(folder: Path, commit: str, files: list[Listed], *, changed: bool) -> Pulled:
    """What lies in the folder, of files that are as the Hub lists them.

    Raises:
        MechintError: a file that is not what bundle_metadata.json says.
    """
    by_name = {file.path: file for file in files}
    bundle = read_json(folder / METADATA, METADATA) if METADATA in by_name else {}
    stated = stated_hashes(bundle, METADATA)
    for name, sha256 in stated.items():
        if name not in by_name:
            raise MechintError(
                f"{METADATA} lists {name}, which is not in the repository: it is not whole; nothing kept"
            )
        if (by_name[name].sha256 or sha256_file(folder / name)) != sha256:
            raise MechintError(
                f"{name} is not what {METADATA} says (SHA-256 {sha256[:12]} is stated): it was changed after it was"
                " published; nothing kept; ask its owner, or give another --revision"
            )
    kind = bundle.get("kind")
    sizes = {file.path: file.size for file in files}
    return Pulled(folder, commit, kind if isinstance(kind, str) else None, sizes, tuple(sorted(stated)), changed)


def _check_room(stage: Path, files: list[Listed]) -> None:
    there = sum(path.stat().st_size for path in stage.rglob("*") if path.is_file())
    needed = sum(file.size for file in files) - there + SPARE_ROOM
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
