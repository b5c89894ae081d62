"""One file of a repository: where its token goes, what of it is fetched, and how it is known to be right."""

import hashlib
from pathlib import Path

import pytest
from hub_online import Online

from mechint.huggingface.client import hub_api, resolve_revision, tree
from mechint.huggingface.files import Listed, cached_file, difference, fetch_rest, listed, place_of

pytest_plugins = ["hub_online"]
WEIGHTS, CONFIG = bytes(range(256)) * 4096, b'{"d_in": 4}'


@pytest.fixture
def files(online: Online) -> tuple[str, dict[str, Listed]]:
    """A repository's commit, and its files as they are listed."""
    online.hub.add_repo("lab/one", {"w.safetensors": WEIGHTS, "cfg.json": CONFIG})
    commit = resolve_revision("lab/one", None)
    return commit, {name: listed(entry) for name, entry in tree(hub_api(), "lab/one", commit).items()}


def test_the_rest_is_fetched_and_the_token_stays_with_the_hub(online: Online, files, tmp_path: Path):
    commit, by_name = files
    part = tmp_path / "part"
    part.write_bytes(WEIGHTS[:1000])
    fetch_rest(place_of("lab/one", "w.safetensors", commit), by_name["w.safetensors"], part)
    assert part.read_bytes() == WEIGHTS
    (sent,) = online.hub.seen("GET", "/storage/")
    assert sent.headers["range"] == "bytes=1000-" and "authorization" not in sent.headers
    assert any("authorization" in asked.headers for asked in online.hub.seen("HEAD", "/resolve/"))


def test_a_small_file_and_one_that_is_too_long_begin_anew(files, tmp_path: Path):
    commit, by_name = files
    for name, whole, wrong in (("cfg.json", CONFIG, b"xx"), ("w.safetensors", WEIGHTS, WEIGHTS + b"more")):
        part = tmp_path / name
        part.write_bytes(wrong)
        fetch_rest(place_of("lab/one", name, commit), by_name[name], part)
        assert part.read_bytes() == whole


def test_a_file_is_held_to_what_is_listed(files, tmp_path: Path):
    _, by_name = files
    assert by_name["w.safetensors"].sha256 == hashlib.sha256(WEIGHTS).hexdigest() and by_name["cfg.json"].sha256 is None
    for name, whole in (("cfg.json", CONFIG), ("w.safetensors", WEIGHTS)):
        path = tmp_path / name
        assert difference(path, by_name[name]) == "missing"
        path.write_bytes(whole[:-1])
        assert difference(path, by_name[name]) == f"{len(whole) - 1} bytes in place of {len(whole)}"
        path.write_bytes(whole[:-1] + b"?")
        assert difference(path, by_name[name]) == "another hash"
        path.write_bytes(whole)
        assert difference(path, by_name[name]) is None


def test_what_was_never_downloaded_is_not_in_the_cache(online: Online):
    assert cached_file("lab/one", "cfg.json") is None and cached_file("/no/such folder", "cfg.json") is None
