"""Files of a repository: fetched from the byte where an earlier attempt stopped, compared with what the Hub lists, or
found in its cache.

The client's own download keeps nothing of a file that it did not finish in a process that is gone; its inner function
can go on with one, and is what is used here. Files in the chunk store (Xet) are served over plain HTTP as well.
"""

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mechint.huggingface.client import hub_endpoint

CHUNK_BYTES = 1 << 20


class Listed(NamedTuple):
    """A file as the Hub lists it; `sha256` for large files, git's `blob_id` for the others."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


def listed(entry: Any) -> Listed:
    """From an entry of the client's listing of a repository."""
    return Listed(entry.path, int(entry.size), entry.lfs.sha256 if entry.lfs is not None else None, entry.blob_id)


class Place(NamedTuple):
    """Where a file's bytes come from. `url` is the Hub's address of it, `location` the storage's."""

    url: str
    location: str
    chunked: bool  # it is in the chunk store


def place_of(repo_id: str, path: str, commit: str, *, token: str | bool | None = None) -> Place:
    """Ask the Hub where a file is. Raises what the client raises."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(repo_id, path, revision=commit, endpoint=hub_endpoint())
    metadata = get_hf_file_metadata(url, token=token, endpoint=hub_endpoint())
    return Place(url, metadata.location, metadata.xet_file_data is not None)


def fetch_rest(place: Place, file: Listed, part: Path, *, token: str | bool | None = None, bar: Any = None) -> None:
    """Append what is missing to `part`. `bar`: a class as tqdm's, told of the bytes. Raises what the client raises."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    headers = build_hf_headers(library_name="mechint", token=token)
    if urlsplit(place.location).netloc != urlsplit(place.url).netloc:
        headers.pop("authorization", None)  # the storage's address is signed; the token is for the Hub only
    with open(part, "ab") as sink:
        if sink.tell() > file.size or file.sha256 is None:  # small ones are not worth a range, and may come compressed
            sink.truncate(0)
        http_get(
            place.location,
            sink,
            resume_size=os.fstat(sink.fileno()).st_size,
            headers=headers,
            expected_size=file.size,
            displayed_filename=file.path,
            tqdm_class=bar,
        )


def difference(path: Path, file: Listed) -> str | None:
    """Why what lies at `path` is not the file that the Hub lists; None if it is."""
    if not path.is_file():
        return "missing"
    if (size := path.stat().st_size) != file.size:
        return f"{size} bytes in place of {file.size}"
    digest, expected = hashlib.sha256(), file.sha256
    if expected is None:  # small ones are known as git knows them
        digest, expected = hashlib.sha1(b"blob %d\0" % file.size), file.blob_id
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            digest.update(chunk)
    return None if digest.hexdigest() == expected else "another hash"


def cached_file(repo_id: str, path: str, *, revision: str | None = None) -> Path | None:
    """A file as it was last downloaded into the Hub's cache; None if it never was. No network."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repo_id, path, revision=revision)
    except HFValidationError:  # the name of a folder, or of nothing
        return None
    return Path(found) if isinstance(found, str) else None
