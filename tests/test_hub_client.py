"""The client of the Hub: downloads, revisions, listings, from the cache without a network; failures as one line."""

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hub_online import Online
from loopback_hub import Account, LoopbackHub, closed_endpoint

from mechint.errors import MechintError
from mechint.huggingface import client

pytest_plugins = ["hub_online"]
REPO = "alice/sae"
BIG = bytes(range(256)) * 100_000  # 25.6 MB: the client keeps what it has in pieces of 10 MiB


def test_a_download_is_cached_and_pinned(online: Online) -> None:
    first = online.hub.add_repo(REPO, {"cfg.json": "1", "layer_3/sae.safetensors": b"weights"})
    online.hub.tag(REPO, "v1")
    second = online.hub.commit(REPO, {"cfg.json": "2"})
    read = lambda **more: client.download(REPO, "cfg.json", **more).read_text()  # noqa: E731
    assert [read(), read(revision="v1"), read(revision=first), read(revision=second)] == ["2", "1", "1", "2"]
    assert client.download(REPO, "layer_3/sae.safetensors").read_bytes() == b"weights"
    assert client.resolve_revision(REPO) == second and client.resolve_revision(REPO, "v1") == first
    assert client.list_files(REPO, revision="v1") == {"cfg.json": 1, "layer_3/sae.safetensors": 7}
    gets = len(online.hub.seen("GET", "/resolve/"))
    read(revision=first)
    assert len(online.hub.seen("GET", "/resolve/")) == gets, "the second time it comes from the cache"


def test_without_the_hub_the_cache_answers(online: Online, monkeypatch: pytest.MonkeyPatch) -> None:
    sha = online.hub.add_repo(REPO, {"cfg.json": "1", "sae.safetensors": b"weights"})
    client.download(REPO, "cfg.json")
    for offline in (False, True):
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setenv("HF_ENDPOINT", closed_endpoint())
        assert client.download(REPO, "cfg.json").read_text() == "1"
        assert client.resolve_revision(REPO) == sha and client.list_files(REPO) == {"cfg.json": 1}
        with pytest.raises(MechintError, match="Hub cannot be reached|HF_HUB_OFFLINE") as caught:
            client.download(REPO, "sae.safetensors")
        assert "\n" not in str(caught.value)


def test_a_download_that_is_cut_goes_on(online: Online) -> None:
    online.hub.add_repo(REPO, {"sae.safetensors": BIG})
    online.hub.fail_next(1, None, match="GET /storage/", after_bytes=12_000_000)
    assert client.download(REPO, "sae.safetensors").read_bytes() == BIG
    assert online.hub.seen("GET", "/storage/")[1].headers["range"] == "bytes=10485760-"


@pytest.mark.parametrize("file", ["../x", "/etc/passwd", "a/../../x", "a\\..\\x"])
def test_a_file_name_stays_in_the_repository(online: Online, file: str) -> None:
    with pytest.raises(MechintError, match="a path inside alice/sae"):
        client.download(REPO, file)
    assert not online.hub.requests


@pytest.mark.parametrize(
    ("repo", "file", "revision", "words"),
    [
        ("alice/none", "cfg.json", None, ["alice/none is not on the Hub, or is private", "hf auth login"]),
        ("alice/secret", "cfg.json", None, ["alice/secret is not on the Hub, or is private"]),
        ("meta/gated", "cfg.json", None, ["meta/gated is gated", "accept its terms"]),
        (REPO, "cgf.json", None, ["no file 'cgf.json'", "nearest: cfg.json"]),
        (REPO, "cfg.json", "v9", ["alice/sae has no such revision"]),
        ("not a name", "cfg.json", None, ["does not allow the repository name"]),
        ("single", "cfg.json", None, ["expected owner/name"]),
    ],
)
def test_what_is_not_there(online: Online, repo: str, file: str, revision: str | None, words: list[str]) -> None:
    online.hub.add_repo(REPO, {"cfg.json": "1"})
    online.hub.add_repo("alice/secret", {"cfg.json": "1"}, private=True)
    online.hub.add_repo("meta/gated", {"cfg.json": "1"}, gated=True)
    with pytest.raises(MechintError) as caught:
        client.download(repo, file, revision=revision)
    for word in words:
        assert word in str(caught.value)
    if file == "cfg.json":
        for call in (client.resolve_revision, client.list_files):
            if repo != "meta/gated":  # its list of files may be read by anybody
                with pytest.raises(MechintError):
                    call(repo, revision=revision)


def test_without_a_token_public_repositories_open(online: Online, monkeypatch: pytest.MonkeyPatch) -> None:
    online.hub.add_repo(REPO, {"cfg.json": "1"})
    monkeypatch.delenv("HF_TOKEN")
    assert client.download(REPO, "cfg.json").read_text() == "1"
    assert all("authorization" not in r.headers for r in online.hub.requests)


def test_a_private_repository_opens_for_its_owner(online: Online) -> None:
    online.hub.accounts["hf_alice"] = Account("alice")
    online.hub.add_repo(REPO, {"cfg.json": "1"}, private=True)
    assert client.download(REPO, "cfg.json", token="hf_alice").read_text() == "1"
    assert client.list_files(REPO, token="hf_alice") == {"cfg.json": 1}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("token hf_abcdefghij1234567890 is bad", "token hf_*** is bad"),
        ("Authorization: Bearer xyz.123", "Authorization: Bearer ***"),
        ("PUT https://s3/x?X-Amz-Signature=abc&k=1 failed", "PUT https://s3/x failed"),
        ("the key is plain-secret.", "the key is ***."),
        ("hf_hub_download of hf_x", "hf_hub_download of hf_x"),
    ],
)
def test_tokens_and_signatures_are_cut(monkeypatch: pytest.MonkeyPatch, text: str, shown: str) -> None:
    monkeypatch.setenv("HF_TOKEN", "plain-secret")
    assert client.without_tokens(text) == shown


def test_the_clients_own_log_is_retold(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the client's handler keeps the stderr that was there when it was first used, which may be that of a test long over
    for handler in logging.getLogger("huggingface_hub").handlers:
        monkeypatch.setattr(handler, "stream", io.StringIO())
    logger = logging.getLogger("huggingface_hub.utils._http")
    with client.clean_client_log(), caplog.at_level(logging.WARNING, logger.name):
        logger.warning("Rate limited. Waiting 38.0s before retry [Retry 1/5].")
        logger.warning("'x' thrown while requesting PUT https://s3/x?X-Amz-Signature=abc")
        logger.warning("something about hf_abcdefghij1234567890")
    assert capsys.readouterr().err == "the Hub's rate limit is reached; going on in 38 s\n"
    assert [record.getMessage() for record in caplog.records] == ["something about hf_***"]
    assert not logger.filters


def test_our_own_mistakes_keep_their_traceback() -> None:
    def check() -> None:
        raise RuntimeError("of the client")

    with (
        pytest.raises(MechintError, match="uploading to a/b failed: of the client"),
        client.hub_errors("uploading to", "a/b"),
    ):
        check()
    with pytest.raises(AttributeError), client.hub_errors("uploading to", "a/b"):
        client.tree(None, "a/b", "main")


def test_patience_has_an_end(online: Online) -> None:
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise ConnectionError("reset")

    with pytest.raises(ConnectionError):
        client.patiently("asking", broken)
    assert len(calls) == client.ATTEMPTS and sum(online.slept) == pytest.approx(2 + 4 + 8)
    calls.clear()
    with pytest.raises(ValueError):
        client.patiently("asking", lambda: calls.append(1) or int("x"))
    assert len(calls) == 1, "what cannot become better by waiting is not tried again"


def test_who_is_logged_in_is_asked_once(online: Online) -> None:
    for repo in ("tester/a", "lab/b", "tester/c"):
        assert client.check_may_write(repo) == "tester"
    assert len(online.hub.seen("GET", "whoami")) == 1


def test_importing_is_light(hub: LoopbackHub, tmp_path: Path) -> None:
    code = (
        "import sys, json; import mechint.huggingface.client, mechint.hub.publish, mechint.hub.bundle;"
        "print(json.dumps(sorted({'torch', 'huggingface_hub', 'transformers', 'datasets', 'rich'} & set(sys.modules))))"
    )
    root = Path(__file__).resolve().parent.parent
    env = hub.env(tmp_path / "hf") | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
