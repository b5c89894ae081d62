"""The bytes of a download: resumed where the last attempt stopped, counted, verified.

Files in the Hub's chunk store (Xet) are left to its own client whole, where its reader is installed. What arrives is
compared with the hash that the repository lists before anything reads it.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mechint.errors import DISK_FULL_ERRNOS, one_line
from mechint.huggingface.files import Listed, difference, fetch_rest, place_of
from mechint.server import storage
from mechint.server.errors import ServiceError, from_hub, hub_failed
from mechint.server.ingest import DOWNLOADED, early_check
from mechint.server.jobs import OUR_MISTAKES, Running, Stop

# Smaller steps than the Hub client's own: progress is seen, and a cancel is heard, this often.
CHUNK_BYTES = 1 << 20


def fetch(running: Running, repo_id: str, commit: str, wanted: list[Listed], repo: Path, token: str | bool) -> None:
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
        if difference(repo / current.path, current):
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
            if difference(repo / current.path, current):
                (repo / current.path).unlink()
                name = one_line(current.path, 100)
                raise hub_failed(f"{name} arrived damaged: it does not have the hash that the Hub lists")
        before += current.size
        report(before, always=current is wanted[-1])
        if current.name == "cfg.json":
            early_check(repo / current.path, running.params.get("model_name"))


def _get(repo_id: str, commit: str, file: Listed, repo: Path, token: str | bool, bar: Any) -> None:
    """One file to its place below `repo`; what is not finished stays beside it as `.part`."""
    from huggingface_hub import constants, hf_hub_download

    source = place_of(repo_id, file.path, commit, token=token)
    if source.chunked and not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None:
        hf_hub_download(repo_id, file.path, revision=commit, local_dir=repo, token=token, tqdm_class=bar)
        return
    place = repo / file.path
    part = place.with_name(place.name + ".part")
    storage.make_dir(place.parent)
    fetch_rest(source, file, part, token=token, bar=bar)
    os.replace(part, place)
