"""`mechint pull`: a repository as a folder, whole or not at all, from a loopback Hub."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_online import Online
from loopback_hub import LoopbackHub
from published import RUN51, platform_bundle, platform_tensors

from mechint.errors import MechintError
from mechint.hub.pull import pull
from mechint.sae.load import load_pretrained_sae

pytest_plugins = ["hub_online"]
ROOT = Path(__file__).resolve().parent.parent
PULL = "import sys; from mechint.cli.pull import main; sys.exit(main(sys.argv[1:]))"


def command(*flags: str) -> list[str]:
    return [sys.executable, "-c", PULL, *flags]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(*words: str, **given: Any) -> str:
    with pytest.raises(MechintError) as told:
        pull(**given)
    assert all(word in str(told.value) for word in words), told.value
    return str(told.value)


@pytest.mark.slow
def test_a_bundle_arrives_whole_and_loads(hub: LoopbackHub, tmp_path: Path):
    bundle = platform_bundle()
    commit = hub.add_repo(RUN51, {**bundle, ".gitattributes": b"*.pt filter=lfs\n"})
    place = tmp_path / "here"
    place.mkdir()

    def run(*flags: str) -> subprocess.CompletedProcess[str]:
        env = hub.env(tmp_path / "hf")
        return subprocess.run(command(*flags), env=env, cwd=place, capture_output=True, text=True, timeout=300)

    done = run(RUN51)
    assert done.returncode == 0, done.stderr
    folder = place / "sae-run51-gpt2-medium"
    assert files_in(folder) == bundle and os.listdir(place) == [folder.name]
    assert "kind: sae" in done.stdout and commit in done.stdout
    checked = [line.split()[-1] for line in done.stdout.splitlines() if "sha256 ok" in line]
    assert checked == sorted(set(bundle) - {"bundle_metadata.json"})
    n_requests = len(hub.seen("GET", "/resolve/|/storage/"))
    done = run(RUN51)
    assert done.returncode == 0 and "was there already" in done.stdout
    assert len(hub.seen("GET", "/resolve/|/storage/")) == n_requests
    sae, config = load_pretrained_sae(str(folder))
    torch.testing.assert_close(sae.W_enc.detach(), platform_tensors()["encoder.weight"].t())
    assert (config["license"], config["model_name"]) == ("research-only", "gpt2-medium")
    assert config["weights_path"] == str(folder / "sae_weights.safetensors")
    other = platform_bundle(1)["sae_weights.safetensors"]
    (folder / "sae_weights.safetensors").write_bytes(other)
    with pytest.raises(MechintError, match="sae_weights.safetensors of .* is not what bundle_metadata.json says"):
        load_pretrained_sae(str(folder))
    done = run(RUN51)
    assert done.returncode == 2 and "give another --output" in done.stderr and "Traceback" not in done.stderr
    assert (folder / "sae_weights.safetensors").read_bytes() == other, "a folder of the user's was changed"


@pytest.mark.slow
def test_a_killed_pull_leaves_no_folder_and_goes_on_where_it_stopped(hub: LoopbackHub, tmp_path: Path):
    big = os.urandom(40 << 20)
    files = {"a.safetensors": os.urandom(1000), "b.safetensors": big}
    hub.add_repo("lab/big", files)
    digest = hashlib.sha256(big).hexdigest()
    hub.bytes_per_second = [(f"GET /storage/{digest}", 8 << 20)]
    place = tmp_path / "here"
    place.mkdir()
    env = hub.env(tmp_path / "hf")
    child = subprocess.Popen(command("lab/big"), env=env, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not any(path.stat().st_size > 12 << 20 for path in place.rglob("parts/*")):
        assert child.poll() is None and time.monotonic() < until, child.stderr and child.stderr.read()
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert not (place / "big").exists()
    hub.bytes_per_second = []
    before = len(hub.requests)
    done = subprocess.run(command("lab/big"), env=env, cwd=place, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert files_in(place / "big") == files and os.listdir(place) == ["big"]
    again = [request for request in hub.requests[before:] if request.method == "GET" and "/storage/" in request.path]
    assert [request.path.rsplit("/", 1)[1] for request in again] == [digest], "what had arrived was downloaded again"
    assert int(again[0].headers["range"].removeprefix("bytes=").split("-")[0]) >= 12 << 20


def test_a_connection_that_breaks_is_taken_up_again(online: Online, tmp_path: Path):
    big = os.urandom(12 << 20)
    online.hub.add_repo("lab/big", {"x.safetensors": big})
    online.hub.fail_next(1, None, match="GET /storage/", after_bytes=11 << 20)
    done = pull("lab/big", tmp_path / "out")
    assert (tmp_path / "out" / "x.safetensors").read_bytes() == big and done.changed and done.verified == ()
    assert [request for request in online.hub.seen("GET", "/storage/") if "range" in request.headers]


def test_what_is_not_what_the_bundle_says_is_not_kept(online: Online, tmp_path: Path):
    changed = platform_bundle() | {"environment.json": b'{"changed": 1}'}
    online.hub.add_repo("lab/changed", changed)
    refused("environment.json", "changed after it was published", repo_id="lab/changed", output=tmp_path / "out")
    lacking = {name: data for name, data in platform_bundle().items() if name != "environment.json"}
    online.hub.add_repo("lab/lacking", lacking)
    refused("lists environment.json", "not whole", repo_id="lab/lacking", output=tmp_path / "out")
    lying = json.loads(platform_bundle()["bundle_metadata.json"])
    lying["files"]["../outside"] = {"sha256": "0" * 64, "size": 1}
    online.hub.add_repo("lab/lying", platform_bundle() | {"bundle_metadata.json": json.dumps(lying).encode()})
    refused("lists ../outside", repo_id="lab/lying", output=tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith((".out", "out"))]


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/outside"])
def test_names_that_lead_out_are_refused_before_anything_is_downloaded(
    online: Online,
    tmp_path: Path,
    name: str,
):
    online.hub.add_repo("lab/hostile", {"README.md": b"# fine\n", name: b"x"})
    refused(repr(name), "leads out", repo_id="lab/hostile", output=tmp_path / "in" / "out")
    assert not online.hub.seen("GET", "/resolve/") and not (tmp_path / "in").exists()


def test_mistakes_and_a_full_disk_are_told(
    online: Online,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    online.hub.add_repo(RUN51, platform_bundle())
    refused("owner/name", repo_id="just-a-name")
    refused("lab/none", "hf auth login", repo_id="lab/none")
    refused("no such revision", repo_id=RUN51, revision="v9")
    (tmp_path / "file").write_text("mine")
    refused("is a file", repo_id=RUN51, output="file")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    refused("exists and is not", "another --output", repo_id=RUN51, output="mine")
    assert files_in(tmp_path / "mine") == {"notes.txt": b"mine"}
    stage = tmp_path / f".busy.{online.hub.history(RUN51)[0].sha[:12]}.part"
    stage.mkdir()
    with open(stage / "lock", "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused("another process is pulling", repo_id=RUN51, output="busy")
    assert pull(RUN51, "busy").changed
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused("no room", "GB are free", repo_id=RUN51, output="full")
    monkeypatch.undo()


def test_an_older_revision_into_an_empty_folder(online: Online, tmp_path: Path):
    first = online.hub.add_repo(RUN51, platform_bundle())
    online.hub.commit(RUN51, platform_bundle(1))
    (tmp_path / "out").mkdir()
    stale = tmp_path / ".out.0123456789ab.part"  # of an interrupted pull of another commit
    stale.mkdir()
    done = pull(RUN51, tmp_path / "out", revision=first)
    assert done.commit == first and files_in(tmp_path / "out") == platform_bundle()
    assert not stale.exists()
    refused("exists and is not", repo_id=RUN51, output=tmp_path / "out")
    assert not pull(RUN51, tmp_path / "out", revision=first).changed


@pytest.mark.slow
def test_the_demo_publishes_and_loads_back(tmp_path: Path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env = kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = str(ROOT / "examples" / "demo_hub.py")
    done = subprocess.run([sys.executable, script], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "codes: differ from the local run's by 0.0e+00" in done.stdout
    assert "she went back" in done.stdout, "the published vector did not steer"
    assert not list(tmp_path.iterdir())
