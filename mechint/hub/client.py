"""The one way to the Hugging Face Hub: the client, downloads, and its failures as errors that say what to do."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def hub_api(token: str | None = None, endpoint: str | None = None) -> Any:
    """A `huggingface_hub.HfApi`. The token is the environment's (HF_TOKEN) or that of `hf auth login`."""
    raise NotImplementedError


@contextlib.contextmanager
def hub_errors(what: str, repo: str | None = None) -> Iterator[None]:
    """Turn every failure of the Hub client inside the block into a `MechintError`; no token is in its text.

    `what` begins the sentence: "uploading", "downloading cfg.json".
    """
    raise NotImplementedError
    yield


def list_files(
    repo_id: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    token: str | None = None,
    endpoint: str | None = None,
) -> dict[str, int]:
    """The files of a repository at a revision and their sizes in bytes."""
    raise NotImplementedError


def resolve_revision(
    repo_id: str,
    revision: str | None = None,
    *,
    repo_type: str = "model",
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """The commit that `revision` (a branch, a tag, a commit; None: main) stands for; the cached one when offline."""
    raise NotImplementedError


def download(
    repo_id: str,
    file: str,
    *,
    revision: str | None = None,
    repo_type: str = "model",
    cache_dir: Path | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """One file of a repository, in the local cache. Works from the cache when the Hub cannot be reached."""
    raise NotImplementedError
