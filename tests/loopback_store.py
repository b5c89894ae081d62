"""The repositories behind the loopback Hub (`loopback_hub.py`): commits, refs and content-addressed blobs.

No HTTP here. Commit shas are derived from the content, the parent and the message alone, so a test that builds the
same history twice gets the same shas.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

Files = Mapping[str, "bytes | str | Path"] | Path | str
REPO_TYPES = ("model", "dataset", "space")

# The Hub stores these through LFS whatever their size (its default .gitattributes), and anything above 10 MB.
LFS_SUFFIXES = (".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".npy", ".npz", ".gz", ".zst", ".zip")
LFS_SIZE = 10_000_000


class HubError(Exception):
    """An answer other than 2xx: the status, the `X-Error-Code` the client turns into an exception type, the text."""

    def __init__(
        self, status: int, code: str | None, message: str, *, body: dict | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.body = status, message, {"error": message} | (body or {})
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self.headers["X-Error-Message"] = message
        if code is not None:
            self.headers["X-Error-Code"] = code


class Blob(NamedTuple):
    """One file's content. `oid`: git's sha1 of it (for LFS, of the pointer file); `sha256`: the name of its bytes."""

    sha256: str
    oid: str
    size: int
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer_size(self) -> int:
        return len(pointer(self.sha256, self.size))

    def entry(self, path: str) -> dict:
        """The file as the tree and paths-info endpoints describe it."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size}
        return entry


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    files: dict[str, Blob]
    number: int

    @property
    def date(self) -> str:
        """A made-up date, one minute after the parent's: nothing depends on the clock."""
        return f"2025-01-01T{self.number // 60 % 24:02d}:{self.number % 60:02d}:00.000Z"


@dataclass
class Repo:
    id: str
    type: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> sha
    lfs: set[str] = field(default_factory=set)  # sha256 of the large files that were sent for this repository

    def ref_name(self, revision: str) -> str | None:
        """The full name of a branch, a tag or a special ref (`refs/pr/1`); None when there is none."""
        candidates = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in candidates if name in self.refs), None)

    def at(self, revision: str) -> Commit:
        name = self.ref_name(revision)
        sha = self.refs[name] if name else revision
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[sha]

    def file(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.at(revision)
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit.sha)
        return commit, commit.files[path]

    def history(self, revision: str) -> list[Commit]:
        """The commits of a revision, newest first."""
        commits, commit = [], self.at(revision)
        while True:
            commits.append(commit)
            if commit.parent is None:
                return commits
            commit = self.commits[commit.parent]

    def entries(self, revision: str, path: str = "", recursive: bool = False) -> list[dict]:
        """Files and folders below `path`, sorted; EntryNotFound when `path` is no folder."""
        commit = self.at(revision)
        prefix = f"{path}/" if path else ""
        entries: dict[str, dict] = {}
        for name, blob in commit.files.items():
            if not name.startswith(prefix):
                continue
            parts = name[len(prefix) :].split("/")
            for depth in range(1, len(parts)):
                folder = prefix + "/".join(parts[:depth])
                if depth == 1 or recursive:
                    entries[folder] = {"type": "directory", "path": folder, "oid": git_sha1(folder.encode()), "size": 0}
            if len(parts) == 1 or recursive:
                entries[name] = blob.entry(name)
        if path and not entries:
            raise HubError(404, "EntryNotFound", f"{path} does not exist on {revision}", X_Repo_Commit=commit.sha)
        return [entries[name] for name in sorted(entries)]

    def commit(
        self,
        changes: Mapping[str, Blob],
        *,
        deleted: Iterable[str] = (),
        branch: str = "main",
        title: str = "Upload",
        parent_sha: str | None = None,
    ) -> Commit:
        """One commit on a branch (made from nothing if new). `deleted` names files, or folders with a final slash."""
        ref = self.ref_name(branch) or (branch if branch.startswith("refs/") else f"refs/heads/{branch}")
        parent = self.commits[self.refs[ref]] if ref in self.refs else None
        if parent_sha is not None and (parent is None or parent.sha != parent_sha):
            raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files) if parent else {}
        for name in deleted:
            gone = [path for path in files if path == name or (name.endswith("/") and path.startswith(name))]
            if not gone:
                raise HubError(404, "EntryNotFound", f"cannot delete {name}: no such entry")
            for path in gone:
                del files[path]
        files |= changes
        self.lfs |= {blob.sha256 for blob in changes.values() if blob.lfs}
        listing = "".join(f"{path}\0{blob.sha256}\n" for path, blob in sorted(files.items()))
        number = parent.number + 1 if parent else 0
        sha = hashlib.sha1(f"{parent and parent.sha}\n{title}\n{number}\n{listing}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent.sha if parent else None, title, files, number)
        self.refs[ref] = sha
        return self.commits[sha]


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def goes_to_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE)


class BlobStore:
    """File contents, each under the sha256 of its bytes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, sha256: str) -> Path:
        return self.folder / sha256

    def put(self, content: bytes) -> str:
        sha256 = hashlib.sha256(content).hexdigest()
        if not self.path(sha256).exists():
            self.path(sha256).write_bytes(content)
        return sha256

    def blob(self, path: str, content: bytes) -> Blob:
        sha256, lfs = self.put(content), goes_to_lfs(path, len(content))
        return Blob(sha256, git_sha1(pointer(sha256, len(content)) if lfs else content), len(content), lfs)

    def blobs(self, files: Files) -> dict[str, Blob]:
        """`files`: a folder (every file below it), or {path in the repo: bytes, text or a local Path}."""
        if not isinstance(files, Mapping):
            root = Path(files)
            assert root.is_dir(), f"{root} is not a folder"
            files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
        contents = {
            path: value.encode() if isinstance(value, str) else value.read_bytes() if isinstance(value, Path) else value
            for path, value in files.items()
        }
        return {path: self.blob(path, content) for path, content in contents.items()}
