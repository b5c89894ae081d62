"""The one error a user sees: what was given, what was expected, what to do next, in one line."""

import difflib
import errno
from collections.abc import Iterable

# What a full disk looks like: no space, quota reached, or a file-size limit (ulimit -f).
DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
# Files and folders that the system does not let this user read or write as the command must.
REFUSED_ERRNOS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
)


class MechintError(Exception):
    """A mistake the user can mend. Commands print it as one line and exit with status 2, without a traceback.

    Our own mistakes are `assert`s and keep their traceback.
    """


def nearest(given: str, options: Iterable[str], count: int = 3) -> str:
    """A phrase for the end of an error message that names the valid options closest to `given`.

    Falls back to the first options when nothing is close, so that the reader always sees a valid name.
    """
    options = list(options)
    close = difflib.get_close_matches(given, options, n=count, cutoff=0.5)
    if close:
        return "nearest: " + ", ".join(close)
    if len(options) <= 8:
        return "valid: " + ", ".join(options)
    return "valid, for example: " + ", ".join(options[:5])


def one_line(text: object, limit: int = 300) -> str:
    """`text` with its white space folded into single blanks, cut at `limit` characters."""
    folded = " ".join(str(text).split())
    return folded if len(folded) <= limit else folded[: limit - 3] + "..."
