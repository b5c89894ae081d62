"""The bytes of a download: resumed where the last attempt stopped, counted, verified.

The Hub's own client moves them. It keeps nothing of a file that it did not finish, so its inner function is used, which
can go on with one; files in the Hub's chunk store (Xet) are left to it whole. What arrives is compared with the hash
that the repository lists before anything reads it.
"""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mechint.errors import DISK_FULL_ERRNOS, one_line
from mechint.server import storage
from mechint.server.errors import ServiceError, from_hub, hub_failed
from mechint.server.ingest import DOWNLOADED, early_check
from mechint.server.jobs import OUR_MISTAKES, Running, Stop

# Smaller steps than the Hub client's own: progress is seen, and a cancel is heard, this often.
CHUNK_BYTES = 1 << 20


class Wanted(NamedTuple):
    """One file of the repository; `sha256` for large files, git's `blob_id` for the others."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


def fetch(running: Running, repo_id: str, commit: str, wanted: list[Wanted], repo: Path, token: str | bool) -> None:
    """Download files to `repo`, keeping those that are there already and right.

    Raises:
        ServiceError: the Hub's failures, or a file that does not have the listed hash.
    """
    from huggingface_hub import constants
    from tqdm import tqdm

    constants.DOWNLOAD_CHUNK_SIZE = min(constants.DOWNLOAD_CHUNK_SIZE, CHUNK_BYTES)
    total = sum(file.size for file in wanted)
    before = 0

    def report(n_bytes: int, *, always: bool = False) -> None:
        progress = DOWNLOADED * n_bytes / max(total, 1)
        text = f"Downloading: {progress:.1f}%"
        running.report("download", progress, text, bytes_done=n_bytes, bytes_total=total, always=always)

    class Bar(tqdm):
        """Counts the bytes of one file; what a resumed file had already counts too."""

        def __init__(self, *args: Any, **kwargs: Any):
            self.bytes = int(kwargs.get("initial") or 0)
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> None:
            self.bytes += int(n or 0)
            report(before + max(0, min(self.bytes, current.size)))

    report(0, always=True)
    for current in wanted:
        running.check()
        if not is_right(repo / current.path, current):
            try:
                _get(repo_id, commit, current, repo, token, Bar)
            except Stop:
                raise
            except Exception as error:  # the HTTP library's classes differ between versions of huggingface_hub
                running.check()  # a stop that the client wrapped comes out again
                if isinstance(error, OSError) and error.errno in DISK_FULL_ERRNOS:
                    raise ServiceError(
                        "disk_full", "No room for the download", "make room, retry", status=507
                    ) from None
                if isinstance(error, OUR_MISTAKES):
                    raise
                raise from_hub(error, repo_id, what="downloading from") from None
            if not is_right(repo / current.path, current):
                (repo / current.path).unlink()
                name = one_line(current.path, 100)
                raise hub_failed(f"{name} arrived damaged: it does not have the hash that the Hub lists")
        before += current.size
        report(before, always=current is wanted[-1])
        if current.name == "cfg.json":
            early_check(repo / current.path, running.params.get("model_name"))


def _get(repo_id: str, commit: str, file: Wanted, repo: Path, token: str | bool, bar: Any) -> None:
    """One file to its place below `repo`; what is not finished stays beside it as `.part`."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import get_hf_file_metadata, hf_hub_download, hf_hub_url, http_get
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repo_id, file.path, revision=commit)
    metadata = get_hf_file_metadata(url, token=token)
    if metadata.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None:
        hf_hub_download(repo_id, file.path, revision=commit, local_dir=repo, token=token, tqdm_class=bar)
        return
    headers = build_hf_headers(token=token)
    if urlsplit(metadata.location).netloc != urlsplit(url).netloc:
        headers.pop("authorization", None)  # the address is signed, and not the Hub's: it gets no token
    place = repo / file.path
    part = place.with_name(place.name + ".part")
    storage.make_dir(place.parent)
    if part.exists() and part.stat().st_size > file.size:
        part.unlink()
    with open(part, "ab") as sink:
        there = sink.tell()
        http_get(metadata.location, sink, resume_size=there, headers=headers, expected_size=file.size, tqdm_class=bar)
    os.replace(part, place)


def is_right(path: Path, file: Wanted) -> bool:
    """Whether a file is there and is what the repository lists."""
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with open(path, "rb") as handle:
        if file.sha256 is not None:
            return hashlib.file_digest(handle, "sha256").hexdigest() == file.sha256
        digest = hashlib.sha1(b"blob %d\0" % file.size)
        while chunk := handle.read(storage.CHUNK):
            digest.update(chunk)
        return digest.hexdigest() == file.blob_id
