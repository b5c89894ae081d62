"""What must not leave this machine: absolute paths, the user's and the machine's name, tokens.

Text files are rewritten (paths become relative, names go); a token anywhere in a file is an error, never rewritten,
because whoever wrote it there must know.
"""

import contextlib
import functools
import getpass
import os
import re
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

# Text that programs write: a user name found there came from the machine. In prose (.md, .tex) it may be an author's.
MACHINE_TEXT = frozenset({".json", ".jsonl", ".csv", ".tsv", ".html", ".svg", ".yaml", ".yml", ".toml", ".log", ".txt"})
PROSE = frozenset({".md", ".rst", ".tex", ".bib", ".py", ".ipynb", ".sh", ".cfg", ".ini"})
TEXT = MACHINE_TEXT | PROSE

# Names that say nothing about who owns the machine and that are words of their own.
_COMMON = frozenset(
    re.split(
        r"\s+",
        "root user users admin administrator ubuntu debian fedora centos ec2-user docker jovyan runner vagrant guest"
        " nobody test tester default localhost local host home server node worker master main model models data train"
        " training base",
    )
)
_SYSTEM = ("usr", "bin", "sbin", "etc", "dev", "proc", "sys", "lib", "lib64", "opt", "boot")
# Folders below which people and clusters keep their files.
_PLACES = (
    r"home|Users|root|tmp|var|private|mnt|media|Volumes|scratch|work|workspace|lustre|gpfs|nfs|srv|storage|cluster"
)
# Base64 data are matched so that they can be passed over: any letters may stand in them.
_ENCODED = r"base64,[A-Za-z0-9+/=]+"
_PATH_LETTER = r"[^\s\"'<>`\\(){}\[\],;|]"
_ANYWHERE = re.compile(rf"{_ENCODED}|(?:file://|(?<![\w.:/~<+=-]))/(?:{_PLACES})/{_PATH_LETTER}*")
_JSON_STRING = re.compile(rf"{_ENCODED}|(?<=\")(?:file://)?/(?!/)[^\s\"\\]*(?=\")")
# In other files that programs write: a cell, an element or a value that is an absolute path as a whole. A link's
# target (href="/a/b") is none.
_VALUE = re.compile(
    rf"{_ENCODED}|(?:(?<=[>,\t\n])|(?<=: )|(?<= = )|(?<=[^=]\"))(?:file://)?/(?![/>])[^\s\"'<>,]+/[^\s\"'<>,]*(?=[<,\t\n\r\"]|$)"
)
_WINDOWS = re.compile(r"[A-Za-z]:\\{1,2}(?:Users|Documents and Settings)\\{1,2}[^\s\"'<>]*")

# Access tokens by how they begin: Hugging Face, GitHub, OpenAI and Anthropic, AWS.
_TOKEN = re.compile(
    rb"\bhf_[A-Za-z0-9]{20,}|\bapi_org_[A-Za-z0-9]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"
    rb"|\bsk-[A-Za-z0-9_-]{32,}|\bAKIA[0-9A-Z]{16}\b"
)
# The longest piece of a token that must be seen whole where a file is read in pieces.
OVERLAP = 256
_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "GITHUB_TOKEN", "OPENAI_API_KEY")


def scrub(text: str, suffix: str, *, roots: Sequence[Path] = (), keep: Iterable[str] = ()) -> str:
    """`text` without the absolute paths and names of this machine.

    Args:
        suffix: of the file that it is from, ".json"; decides what is a path there.
        roots: folders that paths become relative to, the innermost wins; the home folder follows. The current folder
            gives no names, else what is published would depend on where the command was called.
        keep: words that stay even if the user or the machine is called so: the owner of the repository.
    """
    kept = {word.lower() for word in keep}
    # What was cut out of the middle of something can leave a path behind: until nothing is found.
    for _ in range(8):
        before, text = text, _scrub_once(text, suffix, roots, kept)
        if text == before:
            break
    return text


def _scrub_once(text: str, suffix: str, roots: Sequence[Path], kept: set[str]) -> str:
    # Looking for the plain words first is many times faster than the expressions, and mostly finds nothing.
    for root, instead in _prefixes(roots):
        if root not in text:
            continue
        text = _prefix_pattern(root).sub(lambda match, instead=instead: _relative(match, instead), text)
    if suffix in (".json", ".jsonl", ".ipynb") and ('"/' in text or '"file:' in text):
        text = _JSON_STRING.sub(_last_part_of_path, text)
    elif suffix in MACHINE_TEXT:
        text = _VALUE.sub(_last_part_of_path, text)
    if any(f"/{place}/" in text for place in _PLACES.split("|")):
        text = _ANYWHERE.sub(_last_part, text)
    here = str(Path.cwd())
    if len(Path(here).parts) > 1 and here in text:
        text = _below(here).sub(_last_part, text)
    if ":\\" in text:
        text = _WINDOWS.sub(lambda match: re.split(r"\\+", match[0].rstrip("\\"))[-1], text)
    users, hosts = _names()
    lower = text.lower()
    for name in hosts - kept:
        if name.lower() not in lower:
            continue
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "host", text, flags=re.IGNORECASE)
    for name in users:
        if name not in text:
            continue
        text = re.sub(rf"(?<![\w.-]){re.escape(name)}@[\w.-]+", "user@host", text)
        if suffix not in PROSE and name.lower() not in kept | _COMMON and len(name) > 2:
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", "user", text)
    return text


def find_token(content: bytes) -> str | None:
    """How a token in `content` begins, if there is one. Knows the usual forms and the ones this process uses."""
    if (match := _TOKEN.search(content)) is not None:
        return match[0][:3].decode() + "..."
    for name in _SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= 8 and secret.encode() in content:
            return f"the value of {name}"
    return None


def _prefixes(roots: Sequence[Path]) -> list[tuple[str, str]]:
    """Folders as text and what takes their place, longest first so that the innermost one wins."""
    pairs: dict[str, str] = {}
    for folder, instead in [*((root, "") for root in roots), (Path.home(), "~")]:
        for form in {os.path.abspath(folder), str(folder.resolve())}:
            if len(Path(form).parts) > 1:
                pairs.setdefault(form, instead)
    return sorted(pairs.items(), key=lambda pair: -len(pair[0]))


@functools.lru_cache(maxsize=64)
def _prefix_pattern(root: str) -> re.Pattern[str]:
    return re.compile(rf"{_ENCODED}|(?:file://|(?<![\w.~-])){re.escape(root)}(?P<rest>/?)(?![\w.-](?<!/.))")


@functools.lru_cache(maxsize=16)
def _below(folder: str) -> re.Pattern[str]:
    """Paths below a folder, and the folder itself."""
    return re.compile(rf"{_ENCODED}|(?:file://|(?<![\w.~-])){re.escape(folder)}(?:/{_PATH_LETTER}*)?(?![\w-])")


def _relative(match: re.Match[str], instead: str) -> str:
    if match["rest"] is None:
        return match[0]
    if match["rest"]:
        follows = match.string[match.end() : match.end() + 1]
        if follows and not re.match(r"[\s\"'<>`)\],;]", follows):
            return f"{instead}/" if instead else ""
    return instead or "."


def _last_part(match: re.Match[str]) -> str:
    if match[0].startswith("base64,"):
        return match[0]
    path = match[0].removeprefix("file://")
    tail = path[len(path.rstrip(".:")) :]
    return (PurePosixPath(path.rstrip(".:")).name or ".") + tail


def _last_part_of_path(match: re.Match[str]) -> str:
    """A JSON string that is an absolute path as a whole; one part alone ("/") or a system folder tells nothing."""
    if match[0].startswith("base64,"):
        return match[0]
    path = PurePosixPath(match[0].removeprefix("file://"))
    if len(path.parts) < 3 or path.parts[1] in _SYSTEM:
        return match[0]
    return path.name


def _names() -> tuple[set[str], set[str]]:
    """The names of the user, and of the machine where it is not a common word."""
    users = {Path.home().name}
    with contextlib.suppress(OSError, KeyError):  # a user id without an entry, as in containers
        users.add(getpass.getuser())
    host = socket.gethostname()
    hosts = {name for name in (host, host.split(".")[0]) if len(name) > 3 and name.lower() not in _COMMON}
    return {name for name in users if name}, hosts
