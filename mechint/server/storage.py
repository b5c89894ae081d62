"""Files of the service: contained paths, staging, publishing by one rename, deletion, and what a crash left behind.

<data>/saes/<sae id>/      a whole, verified SAE; the folder appears by a rename, inside the transaction that makes
                           its row ready
<data>/staging/<job id>/   what a job works on, one folder an attempt
<data>/trash/              what was taken out of the library and is being removed
"""

import contextlib
import os
import re
import shutil
import stat
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from sqlalchemy import select

from mechint.errors import DISK_FULL_ERRNOS
from mechint.provenance import fsync_dir, make_dir
from mechint.server.db import Database
from mechint.server.errors import ServiceError, bad_request, file_not_found
from mechint.server.models import LIVE, Job, SharedSAE
from mechint.server.settings import Settings

ID = re.compile(r"(sae|job)_[0-9a-f]{12}")
CHUNK = 1 << 20
MAX_FILES = 20_000
# Free space that is left alone.
SPARE_BYTES = 64 << 20


def relative_name(path: str, what: str = "filepath") -> str:
    """A path inside a repository or folder, as `a/b/c`; `.` for the top.

    Raises:
        ServiceError: it is absolute, leads out, or holds what no file name of a repository does.
    """
    plain = path.strip().rstrip("/")
    if plain in ("", "."):
        return "."
    parts = plain.removeprefix("./").split("/")
    odd = any(part in ("", ".", "..") or part.startswith("~") for part in parts)
    if odd or "\\" in plain or not plain.isprintable() or re.match(r"[A-Za-z]:", plain) or ".git" in parts:
        raise bad_request(f"{what} leads out of the repository: {path[:200]!r}", "give a path such as layer_6")
    return "/".join(parts)


def sae_folder(settings: Settings, sae_id: str) -> Path:
    """Where an SAE's files lie. The id is checked: it comes from addresses."""
    return _by_id(settings.saes_dir, sae_id)


def _by_id(folder: Path, name: str) -> Path:
    if ID.fullmatch(name) is None:
        raise bad_request(f"not an id: {name[:60]!r}")
    return folder / name


# --- staging and publishing -------------------------------------------------------------------------------------------


def stage(settings: Settings, job_id: str, attempt: int, *, take_over: bool) -> Path:
    """An empty folder for this attempt; with `take_over`, what the last attempt had downloaded is in it.

    A worker that is late still writes into its own folder, never into ours. What is taken over is verified by its hash
    before it is used, as everything is.
    """
    root = _by_id(settings.staging_dir, job_id)
    own = root / f"{attempt:04d}-{uuid.uuid4().hex[:8]}"
    make_dir(own)
    others = sorted(entry for entry in root.iterdir() if entry != own)
    if take_over and others:
        with contextlib.suppress(OSError):
            os.rename(others[-1] / "repo", own / "repo")
    for entry in others:
        shutil.rmtree(entry, ignore_errors=True)
    return own


def unstage(settings: Settings, job_id: str) -> None:
    """Remove all that a job staged."""
    shutil.rmtree(_by_id(settings.staging_dir, job_id), ignore_errors=True)


def publish(settings: Settings, staged: Path, sae_id: str) -> Path:
    """Rename a staged folder into the library. Call it inside the transaction that makes the row ready.

    What a crash between such a rename and its commit left under the id is replaced.
    """
    target = sae_folder(settings, sae_id)
    make_dir(settings.saes_dir)
    discard(settings, target)
    os.rename(staged, target)
    fsync_dir(settings.saes_dir)
    return target


def flush(folder: Path) -> None:
    """Bring a tree to the disk before it is published."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_dir(path)
    fsync_dir(folder)


def link(source: Path, target: Path) -> None:
    """A second name for a file, so that a next attempt finds it under the first one too; else a rename."""
    try:
        os.link(source, target)
    except OSError:
        os.rename(source, target)


def discard(settings: Settings, folder: Path) -> None:
    """Take a folder away at once, by a rename, and then remove it; what a crash leaves in the trash is swept."""
    make_dir(settings.trash_dir)
    gone = settings.trash_dir / uuid.uuid4().hex
    try:
        os.rename(folder, gone)
    except FileNotFoundError:
        return
    if gone.is_dir() and not gone.is_symlink():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file() and not entry.is_symlink())


def check_room(settings: Settings, n_bytes: int, what: str) -> None:
    """Raise before work that cannot end well: an SAE that is too large, or a disk that is too full for it.

    Beside the original stand two copies of the weights in float32, the checkpoint's and SAELens's.
    """
    if n_bytes > settings.max_sae_bytes:
        raise ServiceError(
            "too_large",
            f"{what} has {n_bytes / 2**20:,.0f} MiB, allowed are {settings.max_sae_bytes / 2**20:,.0f}",
            "choose a single SAE of the repository, or have the operator raise MECHINT_MAX_SAE_BYTES",
            status=413,
        )
    make_dir(settings.data_dir)
    free = shutil.disk_usage(settings.data_dir).free
    needed = 3 * n_bytes + SPARE_BYTES
    if free < needed:
        raise ServiceError(
            "disk_full",
            f"No room for {what}: {needed / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free",
            "delete SAEs that are not needed, or have the operator make room",
            status=507,
        )


# --- sweeping ---------------------------------------------------------------------------------------------------------


def sweep(settings: Settings, db: Database) -> list[Path]:
    """Remove what crashes left: staging of jobs that are over, folders of no ready SAE, trash. Safe at any time.

    The folders are listed before the rows are read, and a row is there before any of its files, so that nothing which
    is just being made is taken for an orphan.
    """
    staged, kept, trash = (_entries(folder) for folder in (settings.staging_dir, settings.saes_dir, settings.trash_dir))
    with db.read() as session:
        live = {job.id: job.sae_id for job in session.scalars(select(Job).where(Job.state.in_(LIVE)))}
        # files of a deleted row were left on purpose if its local_path is still set
        rows = session.execute(select(SharedSAE.id, SharedSAE.status, SharedSAE.local_path))
        owned = {sae_id for sae_id, status, path in rows if status in ("ready", "deleted") and path is not None}
    busy = set(live.values())
    removed = []
    for path in staged:
        if path.name not in live:
            removed.append(path)
            shutil.rmtree(path, ignore_errors=True)
    for path in kept:
        if path.name not in owned and path.name not in busy:
            removed.append(path)
            discard(settings, path)
    for path in trash:
        removed.append(path)
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


# --- reading what a user names ----------------------------------------------------------------------------------------


def inside(path: str, roots: Iterable[Path]) -> tuple[Path, PurePosixPath]:
    """`(root, path below it)` of an existing file or folder that lies in one of the allowed folders.

    Links are followed before the comparison, so a link that leads out is refused. What exists elsewhere and what does
    not exist at all get one answer.

    Raises:
        ServiceError: File not found.
    """
    if "\0" in path or not path.strip():
        raise file_not_found(path[:200].replace("\0", "?"))
    try:
        real = Path(os.path.realpath(path, strict=True))
        for root in roots:
            top = Path(os.path.realpath(root))
            if os.path.isabs(path) and real.is_relative_to(top):
                return top, PurePosixPath(real.relative_to(top))
    except (OSError, ValueError):
        pass
    raise file_not_found(path[:200])


def copy_in(
    root: Path,
    relative: PurePosixPath,
    target: Path,
    *,
    limit: int,
    skip: Callable[[PurePosixPath], bool] = lambda path: False,
    progress: Callable[[int], None] = lambda n_bytes: None,
) -> int:
    """Copy a file or a folder below `root` to the folder `target`; returns the number of bytes.

    Every part of the path is opened without following links, from the root down, so that nothing which somebody swaps
    for a link meanwhile is read. Links, pipes and devices below a folder are left out.

    Args:
        limit: bytes in all.
        skip: of paths below the folder.
        progress: called with the bytes copied so far.

    Raises:
        ServiceError: it is gone, is a link, or is too large.
    """
    done = 0
    n_files = 0

    def copy_file(handle: int, to: Path) -> None:
        nonlocal done, n_files
        n_files += 1
        with open(handle, "rb") as source, open(to, "wb") as sink:
            while chunk := source.read(CHUNK):
                done += len(chunk)
                if done > limit or n_files > MAX_FILES:
                    raise ServiceError("too_large", f"{relative} is larger than {limit / 2**20:,.0f} MiB", status=413)
                sink.write(chunk)
                progress(done)

    def copy_folder(handle: int, to: Path, below: PurePosixPath) -> None:
        make_dir(to)
        for entry in sorted(os.listdir(handle)):
            path = below / entry
            kind = os.stat(entry, dir_fd=handle, follow_symlinks=False).st_mode
            if skip(path) or not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)):
                continue
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (os.O_DIRECTORY if stat.S_ISDIR(kind) else 0)
            child = os.open(entry, flags, dir_fd=handle)
            if stat.S_ISREG(kind):
                copy_file(child, to / entry)
                continue
            try:
                copy_folder(child, to / entry, path)
            finally:
                os.close(child)

    handles = [os.open(root, os.O_RDONLY | os.O_DIRECTORY)]
    try:
        for part in relative.parts:
            handles.append(os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=handles[-1]))
        kind = os.fstat(handles[-1]).st_mode
        if stat.S_ISDIR(kind):
            copy_folder(handles[-1], target, PurePosixPath())
        elif stat.S_ISREG(kind):
            make_dir(target)
            copy_file(os.dup(handles[-1]), target / relative.name)
        else:
            raise file_not_found(str(root / relative))
    except OSError as error:
        if error.errno in DISK_FULL_ERRNOS:
            raise
        raise file_not_found(str(root / relative)) from error
    finally:
        for handle in handles:
            os.close(handle)
    return done
