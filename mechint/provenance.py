"""Where a result came from and how it reaches the disk: hashes, versions, seeds, atomic writes."""

import contextlib
import datetime
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from mechint.errors import DISK_FULL_ERRNOS, MechintError
from mechint.locks import lock, open_folder

RECORDED_PACKAGES = ("mechint", "torch", "transformer-lens", "transformers", "datasets", "safetensors", "numpy")
_SCRATCH_SUFFIX = ".tmp"


@contextlib.contextmanager
def scratch_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A hidden folder beside `path`, for what is to become `path`; removed, with what is in it, when the block ends.

    What killed processes left there is removed first. A living one holds a lock on its folder, which the operating
    system takes back whatever ends the process; on a file system without locks nothing counts as left behind.
    """
    path = Path(path)
    remove_abandoned(path.parent, path.name)
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_SCRATCH_SUFFIX))
        handle = open_folder(folder)
        if handle is not None:
            lock(handle, wait=True)
        if folder.exists():  # else another process took it for left behind before it was locked
            break
        if handle is not None:
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Remove what `scratch_folder` and `atomic_path` made in `folder` (for `name`) in processes that were killed."""
    prefix = f".{name}." if name else "."
    try:
        entries = list(os.scandir(folder))
    except PermissionError:  # a folder that may be written, but not looked into
        return
    for entry in entries:
        if entry.name.startswith(prefix) and entry.name.endswith(_SCRATCH_SUFFIX) and entry.is_dir():
            with contextlib.suppress(OSError):
                handle = open_folder(entry.path)
                if handle is not None:
                    if lock(handle):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    os.close(handle)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, *, overwrite: bool = True) -> Iterator[Path]:
    """A temporary path of the same name that becomes `path` when the block ends well, and is removed when it does not.

    It lies in a `scratch_folder`, so that what a library writes beside it (safetensors does) goes with it. The file is
    flushed to the disk before the rename, so after a crash or a power cut `path` holds either its old content or all of
    its new content. A full disk, or a place where nothing can be written, raises `MechintError`; what was at `path`
    stays.
    """
    path = Path(path)
    if not overwrite and path.exists():
        raise MechintError(f"{path} exists and is not overwritten: give another name or move it away")
    check_output_path(path)
    make_dir(path.parent)
    try:
        with scratch_folder(path) as scratch:
            temporary = scratch / path.name
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            # safetensors makes files private; what is published should follow the user's umask like any other file
            os.chmod(temporary, 0o666 & ~_umask())
            if overwrite:
                os.replace(temporary, path)
            else:
                os.link(temporary, path)  # fails if somebody made `path` meanwhile, unlike a rename
            fsync_dir(path.parent)
    except Exception as error:
        if (reason := disk_full_reason(error)) is not None:
            raise disk_full(path, reason) from error
        raise


def disk_full_reason(error: BaseException | None) -> str | None:
    """The operating system's words if a full disk is behind `error`, also where a library wraps them in its own.

    torch raises another error while it closes the file, safetensors one that has the number in its text only.
    """
    while error is not None:
        for number in DISK_FULL_ERRNOS:
            text = str(error)
            if f"code: {number}," in text or f"os error {number})" in text or getattr(error, "errno", 0) == number:
                return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def disk_full(path: str | os.PathLike, reason: str) -> MechintError:
    """The error for a write that found no room; names the file and says that a rerun goes on where it stopped."""
    return MechintError(
        f"no room to write {path} ({reason}): free some space and run the same command again;"
        " what was finished before is kept"
    )


def check_output_path(path: str | os.PathLike) -> None:
    """Raise `MechintError`, before any work is done for it, if a file could not be made at `path`. Makes nothing."""
    path = Path(path)
    if path.is_dir():
        raise MechintError(f"{path} is a folder: give the name of a file in it")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise MechintError(f"{path} cannot be written: {folder} is a file, not a folder; give another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MechintError(f"{path} cannot be written: you may not write into {folder}; give another place")


def make_dir(path: str | os.PathLike) -> None:
    """Make a folder and those around it, if they are not there. Raises `MechintError` if that cannot be done."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MechintError(f"folder {path} cannot be made ({error.strerror}): give another place") from error


@functools.cache
def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_dir(path: str | os.PathLike) -> None:
    """Make renames inside the directory durable (POSIX: the entry is in the directory's own data)."""
    handle = open_folder(path)
    if handle is not None:
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_text(path: str | os.PathLike, text: str, *, overwrite: bool = True) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any, *, overwrite: bool = True) -> None:
    """Write JSON atomically: indent 2, sorted keys, newline at the end, as every JSON of a run directory."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n", overwrite=overwrite)


def read_json(path: str | os.PathLike, what: str = "JSON file") -> dict[str, Any]:
    """Read a JSON object; `what` names it in the error. Raises `MechintError` when missing or broken."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MechintError(f"{what} not found: {path}") from None
    except (OSError, ValueError) as error:  # ValueError also for an integer of thousands of digits
        raise MechintError(f"{what} {path} cannot be read: {error}") from error
    except RecursionError:
        raise MechintError(f"{what} {path} cannot be read: it is nested too deeply") from None
    if not isinstance(value, dict):
        raise MechintError(f"{what} {path} should hold a JSON object, found {type(value).__name__}")
    return value


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no blanks)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@functools.cache
def get_git_commit(default: str = "unknown") -> str:
    """Short commit of the checkout that this package runs from, with `-dirty` if it has changes; else `default`.

    Asked of the code's own folder, not of the current one: a run started elsewhere must not record a stranger's commit.
    """
    folder = Path(__file__).resolve().parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return default
    return done.stdout.strip() or default


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    import platform

    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def timestamp_slug() -> str:
    """The local time as `20260131-235959`, the default name of a run."""
    return datetime.datetime.now().strftime("%Y%m%d-%H%M%S")


def detect_device(explicit: str | None = None) -> str:
    """`explicit` if given, else the first of cuda, mps, cpu that works. Raises `MechintError` if it cannot be used."""
    import torch

    if explicit is None:
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=explicit)
    except (RuntimeError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise MechintError(f"device {explicit!r} cannot be used here ({first_line}): try --device cpu") from error
    return explicit


def set_global_seed(seed: int) -> None:
    """Seed Python's and torch's generators (all devices)."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
