"""The loopback Hub and a client in this process that may talk to it: `pytest_plugins = ["hub_online"]`.

Elsewhere the tests keep the client offline; here its constants, which it read when it was imported, are replaced for
the length of one test. Waiting takes no time, and `Online.slept` holds how long each wait would have been.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from loopback_hub import LoopbackHub


@dataclass
class Online:
    hub: LoopbackHub
    home: Path  # of the client: its cache and its token file
    slept: list[float] = field(default_factory=list)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "server", orgs=("lab",)) as hub:
        yield hub


@pytest.fixture
def online(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Online:
    """Logged in to the loopback Hub as its user, by the environment."""
    from huggingface_hub import constants

    from mechint.huggingface import client

    home = tmp_path / "hf_home"
    client._whoami.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    found = Online(hub, home)
    real = time.sleep

    def sleep(seconds: float) -> None:
        found.slept.append(seconds)
        real(0)

    monkeypatch.setattr(time, "sleep", sleep)
    return found
