"""What is published together, and its staging: the exact bytes that go up, checked, hashed and complete.

Staging copies every file into a folder of its own and writes README.md and bundle_metadata.json there, before a byte
is sent. What is uploaded is that copy, so a run that changes later cannot change a publish that has begun.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mechint.errors import MechintError, one_line
from mechint.hub.scrub import OVERLAP, TEXT, find_token, scrub
from mechint.huggingface.fetch import METADATA
from mechint.locks import lock
from mechint.provenance import disk_full, disk_full_reason

README = "README.md"
GENERATED = (README, METADATA)
_PIECE = 1 << 20
# Larger text is not rewritten, only searched for tokens: nobody writes such a file by hand, and it would fill memory.
_LARGEST_TEXT = 256 << 20
_STAGING_PREFIX, _LOCK = "mechint-publish-", "lock"


class StagedFile(NamedTuple):
    """One file as it goes up: `sha256` and `size` (bytes) are of the staged content, after scrubbing."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Bundle:
    """Everything that goes up in one commit, before the generated files.

    README.md and bundle_metadata.json are generated when the bundle is staged and must not be among `files`.
    """

    kind: str  # "sae", "steering", "investigation", "checkpoints"
    name: str  # shown in the panel and in the commit message, e.g. "sae-run51-gpt2-medium"
    files: Mapping[str, Path | bytes]  # POSIX path in the repository -> a local file, or content made in memory
    license: str  # as the user said it ("research-only"); goes into bundle_metadata.json unchanged
    # README.md of this bundle in repository `repo_id`: card(repo_id, {path in the repository: StagedFile}).
    # Must be the same text each time for the same arguments (no dates of now), else every publish makes a commit.
    card: Callable[[str, Mapping[str, StagedFile]], str]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the kind's own keys of bundle_metadata.json
    # Before the upload and after it, `check` gets a folder that holds `check_files` under their names here: first the
    # staged ones, then those downloaded from the new commit into a fresh cache. It raises MechintError if what it
    # loads there does not compute the same as the local one. Without check_files one file is downloaded and its hash
    # is compared.
    check: Callable[[Path], None] | None = None
    check_files: tuple[str, ...] = ()
    # Folders of this machine whose absolute path may occur in text files; it is cut away there ("/x/runs/a/sae" with
    # root /x/runs/a becomes "sae"). Paths in the home folder then begin with ~, of others the last part is left.
    roots: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Staged:
    """A bundle as it goes up: `files` in the order of the table, each below `folder` (None in a dry run)."""

    folder: Path | None
    files: dict[str, StagedFile]
    missing: tuple[str, ...] = ()  # local files that are not there; only a dry run goes on without them


def check_names(names: Iterable[str]) -> None:
    """Raise `MechintError` for names that do not stay inside the repository or that one another's folders shadow."""
    names = list(names)
    for name in names:
        path = PurePosixPath(name)
        plain = name == str(path) and not path.is_absolute() and ".." not in path.parts and ".git" not in path.parts
        if not plain or not name.isprintable() or "\\" in name or name == "." or max(map(len, path.parts)) > 255:
            raise MechintError(f"{name!r} cannot be a name in the repository: a relative path without '..' is expected")
        if name in GENERATED:
            raise MechintError(f"{name} is generated and cannot be one of the files: give the file another name")
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    if clash := folders.intersection(names):
        raise MechintError(f"{min(clash)!r} is both a file and a folder of this bundle: rename one of them")


@contextlib.contextmanager
def staged(bundle: Bundle, repo_id: str, *, progress: bool = False) -> Iterator[Staged]:
    """Stage a bundle for `repo_id` in a temporary folder that goes when the block ends.

    Raises:
        MechintError: a file that is missing, changes meanwhile or holds a token; a bad name; no room on the disk.
    """
    check_names(bundle.files)
    _sweep()
    folder, handle = _make_folder()
    try:
        yield _stage(bundle, repo_id, folder / "bundle", progress=progress)
    except OSError as error:
        if (reason := disk_full_reason(error)) is not None:
            raise disk_full(folder, f"{reason}; TMPDIR names another place") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def stage_dry(bundle: Bundle, repo_id: str) -> Staged:
    """What `staged` would make, without writing anything; files that are not there are named in `missing`."""
    check_names(bundle.files)
    return _stage(bundle, repo_id, None, progress=False)


def _stage(bundle: Bundle, repo_id: str, folder: Path | None, *, progress: bool) -> Staged:
    from tqdm import tqdm

    keep = repo_id.split("/")
    files: dict[str, StagedFile] = {}
    missing: list[str] = []
    before: dict[Path, tuple[int, ...]] = {}
    scrubbed: list[str] = []
    total = sum(map(_local_size, bundle.files.values()))
    with tqdm(total=total, desc="staging", unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        for name, source in bundle.files.items():
            if isinstance(source, Path):
                if not source.is_file():
                    if folder is not None:
                        raise MechintError(f"{source} is not a file: it was to be published as {name}")
                    missing.append(name)
                    continue
                _check_link(source, bundle.roots)
                before[source] = _state(source)
            files[name], changed = _stage_file(name, source, folder, bundle.roots, keep, bar.update)
            if changed:
                scrubbed.append(name)
    # All files belong together, so all are looked at again when the last one is there.
    for source, state in before.items():
        if not source.is_file() or _state(source) != state:
            raise MechintError(f"{source} changed while it was staged: let what writes it end, then run this again")
    readme = scrub(bundle.card(repo_id, dict(files)), ".md", roots=bundle.roots, keep=keep)
    generated = {README: _put(README, readme.encode(), folder)}
    own = {"name": bundle.name, "kind": bundle.kind, "license": bundle.license}
    metadata = own | dict(bundle.metadata) | own  # first in the file, and never overridden
    listed = {name: {"sha256": file.sha256, "size": file.size} for name, file in sorted((files | generated).items())}
    for name in scrubbed:
        listed[name]["scrubbed"] = True  # the bytes differ from the local file: paths of the machine are cut
    metadata["files"] = listed
    text = json.dumps(metadata, indent=2, ensure_ascii=False, default=str) + "\n"
    text = scrub(text, ".json", roots=bundle.roots, keep=keep)
    generated[METADATA] = _put(METADATA, text.encode(), folder)
    return Staged(folder, generated | files, tuple(missing))


def _stage_file(
    name: str,
    source: Path | bytes,
    folder: Path | None,
    roots: tuple[Path, ...],
    keep: list[str],
    update: Callable[[int], Any],
) -> tuple[StagedFile, bool]:
    """Stage one file. Returns it, and whether scrubbing changed its bytes."""
    suffix = PurePosixPath(name).suffix.lower()
    small = not isinstance(source, Path) or source.stat().st_size <= _LARGEST_TEXT
    if suffix in TEXT and small:
        original = source.read_bytes() if isinstance(source, Path) else source
        with contextlib.suppress(UnicodeDecodeError):  # not text after all: goes up as it is
            content = scrub(original.decode(), suffix, roots=roots, keep=keep).encode()
            update(len(original) if isinstance(source, Path) else 0)
            return _put(name, content, folder), content != original
    if isinstance(source, bytes):
        return _put(name, source, folder), False
    if suffix == ".safetensors":
        _check_header(name, source, roots, keep)
    digest, size, tail = hashlib.sha256(), 0, b""
    with open(source, "rb") as file, _writer(name, folder) as write:
        while piece := file.read(_PIECE):
            _refuse_token(name, tail + piece)
            digest.update(piece)
            write(piece)
            size, tail = size + len(piece), piece[-OVERLAP:]
            update(len(piece))
    return StagedFile(digest.hexdigest(), size), False


def _put(name: str, content: bytes, folder: Path | None) -> StagedFile:
    _refuse_token(name, content)
    with _writer(name, folder) as write:
        write(content)
    return StagedFile(hashlib.sha256(content).hexdigest(), len(content))


@contextlib.contextmanager
def _writer(name: str, folder: Path | None) -> Iterator[Callable[[bytes], Any]]:
    if folder is None:
        yield lambda piece: None
        return
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        yield file.write


def _refuse_token(name: str, content: bytes) -> None:
    if (found := find_token(content)) is not None:
        raise MechintError(
            f"{name} holds an access token ({found}) and is not published: remove it there, and revoke the token if"
            " anybody else may have seen the file"
        )


def _check_header(name: str, source: Path, roots: tuple[Path, ...], keep: list[str]) -> None:
    """The metadata of a safetensors file are text too, but cannot be rewritten without writing the whole file anew."""
    with open(source, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > 100_000_000:  # the format's own limit; whoever loads it will say more
            return
        header = file.read(length).decode(errors="replace")
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError):
        return
    text = json.dumps(metadata)
    if scrub(text, ".json", roots=roots, keep=keep) != text:
        keys = [key for key, value in metadata.items() if scrub(one := json.dumps(value), ".json", roots=roots) != one]
        raise MechintError(
            f"{name} has a path or a name of this machine in its metadata ({', '.join(keys)}): save it again without"
        )


def _check_link(source: Path, roots: tuple[Path, ...]) -> None:
    """A link that leads elsewhere could publish any file of this machine under an innocent name."""
    if source.is_symlink():
        target = source.resolve()
        if not any(target.is_relative_to(root.resolve()) for root in (source.parent, *roots)):
            raise MechintError(f"{source} is a link that leads out of its folder: put the file itself there")


def _state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _local_size(source: Path | bytes) -> int:
    return source.stat().st_size if isinstance(source, Path) and source.is_file() else 0


def _make_folder() -> tuple[Path, int]:
    """A new folder, and the open lock file in it that tells `_sweep` of other processes that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX))
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT)
        lock(handle)
        if (folder / _LOCK).exists():  # else another process swept it away just before the lock
            return folder, handle
        os.close(handle)


def _sweep() -> None:
    """Remove staging folders of processes that were killed; a living one holds the lock in its folder."""
    own = os.getuid() if hasattr(os, "getuid") else 0
    for folder in Path(tempfile.gettempdir()).glob(f"{_STAGING_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, or gone meanwhile
            if folder.is_symlink() or folder.stat().st_uid != own:
                continue
            handle = os.open(folder / _LOCK, os.O_RDWR)
            try:
                if lock(handle):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(handle)


def read_metadata(text: bytes | str) -> dict[str, Any]:
    """bundle_metadata.json as a dictionary. Raises `MechintError` when it is not one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MechintError(f"{METADATA} is not JSON: {one_line(error, 120)}") from None
    if not isinstance(found, dict):
        raise MechintError(f"{METADATA} should hold a JSON object, found {type(found).__name__}")
    return found
