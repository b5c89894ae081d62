"""kill -9 of the server and of its worker at random moments in the middle of downloads and uploads, over the API."""

import hashlib
import os
import random
import signal
import sqlite3
import subprocess
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("celery")
pytest.importorskip("fastapi")

from serving import Server, SlowHub, below, environment, files_under, sae_files, until  # noqa: E402

from mechint.server.settings import Settings  # noqa: E402

SAES = "/api/v1/saes"
WIDTHS = (1200, 1600, 2000)  # 7 to 12 MB


def workers_of(data: Path) -> list[int]:
    """Process ids of the embedded workers that serve a data folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            continue
        if b"mechint.server.worker" in command and f"MECHINT_DATA_DIR={data}".encode() in environ:
            found.append(int(pid))
    return found


def insist(server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
    """Ask as a client would whose server comes and goes."""
    for _ in range(200):
        try:
            return server.ask(path, body)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if server.process is None or server.process.poll() is not None:
                server.start()
            time.sleep(0.05)
    raise AssertionError(f"{path} is not answered")


def check_library(server: Server, data: Path, expected: dict[str, dict[str, bytes]]) -> None:
    """Everything that is listed is whole, everything on disk is listed, and nothing is left over."""
    listed = insist(server, f"{SAES}?limit=100")["data"]
    assert {sae["id"] for sae in listed} == expected.keys(), "nothing is lost"
    for sae in listed:
        assert (sae["status"], sae["error_message"]) == ("ready", None), sae
        original = data / "saes" / sae["id"] / "original"
        assert {name: (original / name).read_bytes() for name in files_under(original)} == expected[sae["id"]]
        assert (data / "saes" / sae["id"] / "sae" / "certificate.json").is_file()
    assert {path.name for path in (data / "saes").iterdir()} == expected.keys(), "no orphan in the library"
    until(lambda: not files_under(data / "staging") and not files_under(data / "trash"), what="staging to be empty")
    with sqlite3.connect(data / "mechint.db") as connection:
        left = connection.execute(
            "SELECT count(*) FROM jobs WHERE coalesce(token_cipher, lease_until, worker_id) IS NOT NULL"
        )
        assert left.fetchone() == (0,), "no token, lease or worker of a job that is over"
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def run_rounds(root: Path, kills: int, *, seed: int, seconds: float = 400.0) -> dict[str, Any]:
    """Downloads and uploads while `kills` random processes are killed at random moments; returns what happened."""
    rng = random.Random(seed)
    settings = Settings(data_dir=root / "data", max_attempts=10 * kills + 5)
    data = settings.data_dir
    sources = {f"layer_{i}": sae_files(768, width, seed=i) for i, width in enumerate(WIDTHS)}
    killed = {"server": 0, "worker": 0}
    busy_kills = 0
    with SlowHub(root) as hub:
        hub.add_repo("user/many", {k: v for name, files in sources.items() for k, v in below(name, files).items()})
        hub.bytes_per_second = 6e6
        server = Server(environment(hub, settings, root / "hf"))
        server.start()
        began = time.monotonic()
        try:
            expected: dict[str, dict[str, bytes]] = {}
            uploads: dict[str, tuple[str, dict[str, bytes]]] = {}  # job -> (folder of the repository, the SAE's files)

            def more() -> None:
                """Keep some downloads and uploads in the queue."""
                name = rng.choice(sorted(sources))
                sae = insist(server, f"{SAES}/download", {"repo_id": "user/many", "filepath": name})
                expected[sae["id"]] = sources[name]
                ready = [one for one in insist(server, f"{SAES}?status=ready&limit=100")["data"]]
                if ready:
                    chosen = rng.choice(ready)["id"]
                    folder = f"up_{len(uploads)}"
                    asked = {"sae_id": chosen, "repo_id": "tester/mine", "filepath": folder, "create_repo": True}
                    job = insist(server, f"{SAES}/upload", {**asked, "access_token": hub.token})
                    uploads[job["job_id"]] = (folder, expected[chosen])

            more()
            while sum(killed.values()) < kills:
                assert time.monotonic() - began < seconds, killed
                live = insist(server, f"{SAES}/jobs?live=true")
                if len(live) < 2:
                    more()
                    continue
                time.sleep(rng.uniform(0.1, 2.5))
                with sqlite3.connect(data / "mechint.db") as connection:
                    running = connection.execute("SELECT count(*) FROM jobs WHERE state = 'running'").fetchone()[0]
                pids = workers_of(data)
                if rng.random() < 0.5 and pids:
                    killed["worker"] += 1
                    os.kill(rng.choice(pids), signal.SIGKILL)
                else:
                    killed["server"] += 1
                    assert server.stop(kill=True) == -signal.SIGKILL
                    if rng.random() < 0.5:
                        for pid in workers_of(data):  # both at once, as when a machine goes
                            os.kill(pid, signal.SIGKILL)
                busy_kills += bool(running)
            hub.bytes_per_second = None
            until(lambda: not insist(server, f"{SAES}/jobs?live=true"), seconds=120.0, what="all jobs to end")
            check_library(server, data, expected)
            up = hub.files("tester/mine") if uploads else {}
            for job_id, (folder, files) in uploads.items():
                job = insist(server, f"{SAES}/jobs/{job_id}")
                assert job["state"] == "done", job
                assert up[f"{folder}/sae_weights.safetensors"] == files["sae_weights.safetensors"]
            titles = [commit.title for commit in hub.history("tester/mine")] if uploads else []
            assert titles.count("Upload SAE") == len(uploads), "each upload is one commit, however often it began"
            with sqlite3.connect(data / "mechint.db") as connection:
                begun = connection.execute("SELECT sum(attempts), count(*) FROM jobs").fetchone()
        finally:
            if server.process is not None and server.process.poll() is None:
                server.stop()
        until(lambda: not workers_of(data), what="the workers to end")
        return {
            "killed": killed, "while a job ran": busy_kills, "downloads": len(expected), "uploads": len(uploads),
            "attempts": begun[0], "jobs": begun[1], "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


@pytest.mark.slow
def test_three_kills(tmp_path: Path):
    found = run_rounds(tmp_path, 3, seed=1)
    assert sum(found["killed"].values()) == 3 and found["downloads"] >= 1


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path):
    found = run_rounds(tmp_path, 20, seed=20)
    print(found)
    assert found["while a job ran"] >= 10 and found["uploads"] >= 1


@pytest.mark.slow
def test_fifty_downloads_queued_at_once(tmp_path: Path):
    settings = Settings(data_dir=tmp_path / "data")
    sources = [sae_files(64, 128, seed=seed) for seed in range(10)]
    with SlowHub(tmp_path) as hub:
        hub.add_repo("user/ten", {k: v for i, files in enumerate(sources) for k, v in below(f"l{i}", files).items()})
        server = Server(environment(hub, settings, tmp_path / "hf"))
        server.start()
        try:
            began = time.monotonic()
            asked = [
                server.ask(f"{SAES}/download", {"repo_id": "user/ten", "filepath": f"l{i % 10}"}) for i in range(50)
            ]
            queued = time.monotonic() - began
            until(lambda: not server.ask(f"{SAES}/jobs?live=true"), seconds=150.0, what="50 downloads")
            print(f"50 queued in {queued:.1f} s, done in {time.monotonic() - began:.1f} s")
            check_library(server, settings.data_dir, {sae["id"]: sources[i % 10] for i, sae in enumerate(asked)})
            for i, sae in enumerate(asked):
                metadata = server.ask(f"{SAES}/{sae['id']}")["sae_metadata"]
                recorded = {file["path"]: file["sha256"] for file in metadata["files_downloaded"]}
                weights = sources[i % 10]["sae_weights.safetensors"]
                assert recorded["sae_weights.safetensors"] == hashlib.sha256(weights).hexdigest()
        finally:
            server.stop()


@pytest.mark.slow
def test_ctrl_c_ends_the_server_and_its_worker_and_the_job_goes_on_at_the_next_start(tmp_path: Path):
    settings = Settings(data_dir=tmp_path / "data")
    files = sae_files(768, 2000, seed=3)
    with SlowHub(tmp_path) as hub:
        hub.add_repo("user/one", below("a", files))
        hub.bytes_per_second = 4e6
        server = Server(environment(hub, settings, tmp_path / "hf"))
        server.start()
        sae = server.ask(f"{SAES}/download", {"repo_id": "user/one", "filepath": "a"})
        until(lambda: server.ask(f"{SAES}/jobs?sae_id={sae['id']}")[0]["bytes_done"] > 0, what="bytes to arrive")
        assert server.process is not None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=30) == 0
        assert workers_of(settings.data_dir) == []
        hub.bytes_per_second = None
        server.start()
        until(lambda: not server.ask(f"{SAES}/jobs?live=true"), what="the download")
        check_library(server, settings.data_dir, {sae["id"]: files})
        assert server.stop() == 0


def test_a_port_that_is_taken_is_one_line(tmp_path: Path):
    import socket
    import sys

    from serving import ROOT, SERVE

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SERVE, "--port", port, "--data-dir", str(tmp_path / "data")]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith(f"error: port {port} of 127.0.0.1 cannot be used")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "data").exists()


def test_an_address_for_others_needs_an_api_key(tmp_path: Path):
    import sys

    from serving import ROOT, SERVE

    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env.pop("MECHINT_API_KEY", None)
    command = [sys.executable, "-c", SERVE, "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path / "data")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "MECHINT_API_KEY" in done.stderr and done.stderr.count("\n") == 1
