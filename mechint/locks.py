"""Locks on open files and folders, which the operating system takes back whatever ends the process.

Where it has none (Windows, some network file systems) everybody goes on without: nothing then counts as left behind.
"""

import os

try:
    import fcntl
except ImportError:
    fcntl = None

_OPENS_FOLDERS = os.name == "posix"


def lock(handle: int, *, wait: bool = False) -> bool | None:
    """Lock an open file or folder until it is closed. False if another holds it (`wait`: until it lets go); None where
    there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def open_folder(folder: str | os.PathLike) -> int | None:
    """A handle of a folder, to lock or to flush it; None where it is gone, or where folders cannot be opened."""
    if not _OPENS_FOLDERS:
        return None
    try:
        return os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
