"""kill -9 of the server and of its worker at random moments in the middle of downloads and uploads, over the API."""

import contextlib
import hashlib
import os
import random
import signal
import time
import urllib.error
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("celery")
pytest.importorskip("fastapi")

from serving import Server, SlowHub, below, environment, files_under, sae_files, same_weights, settings_for, until  # noqa: E402
from sqlalchemy import select, text  # noqa: E402

from mechint.server.db import Database  # noqa: E402
from mechint.server.jobs import is_gone  # noqa: E402
from mechint.server.models import Job  # noqa: E402

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


def check_library(server: Server, db: Database, data: Path, expected: dict[str, dict[str, bytes]]) -> None:
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
    with db.read() as session:
        for job in session.scalars(select(Job)):
            held = (job.token_cipher, job.token_until, job.lease_until, job.worker_id)
            assert held == (None,) * 4, f"{job.id} is over and holds {held}"
        if db.is_sqlite:
            assert session.execute(text("PRAGMA integrity_check")).scalar_one() == "ok"


def run_rounds(root: Path, kills: int, *, seed: int, seconds: float = 500.0) -> dict[str, Any]:
    """Downloads and uploads while `kills` random processes are killed in the middle of them; returns what happened."""
    rng = random.Random(seed)
    settings = settings_for(root, max_attempts=kills + 5)
    data, db = settings.data_dir, Database(settings.database)
    sources = {f"layer_{i}": sae_files(768, WIDTHS[i % len(WIDTHS)], seed=i) for i in range(9)}
    killed = {"server": 0, "worker": 0, "both": 0}
    stages: dict[str, int] = {}
    with SlowHub(root) as hub:
        hub.add_repo("user/many", {k: v for name, files in sources.items() for k, v in below(name, files).items()})
        server = Server(environment(hub, settings, root / "hf"))
        server.start()
        began = time.monotonic()
        expected: dict[str, dict[str, bytes]] = {}
        uploads: dict[str, tuple[str, dict[str, bytes]]] = {}  # job -> (folder of the repository, the SAE's files)

        def download() -> None:
            name = sorted(sources)[len(expected) % len(sources)]
            sae = insist(server, f"{SAES}/download", {"repo_id": "user/many", "filepath": name})
            expected[sae["id"]] = sources[name]

        def upload() -> None:
            chosen = rng.choice(insist(server, f"{SAES}?status=ready&limit=100")["data"])["id"]
            folder = f"up_{len(uploads)}"
            asked = {"sae_id": chosen, "repo_id": "tester/mine", "filepath": folder, "create_repo": True}
            job = insist(server, f"{SAES}/upload", {**asked, "access_token": hub.token})
            uploads[job["job_id"]] = (folder, expected[chosen])

        def running() -> str | None:
            """The stage of the job that is being done."""
            with db.read() as session:
                found = session.scalars(select(Job).where(Job.state == "running", Job.stage != "queued")).first()
                return f"{found.kind}: {found.stage}" if found is not None and not is_gone(found.worker_id) else None

        try:
            download()
            until(lambda: not insist(server, f"{SAES}/jobs?live=true"), what="the first download")
            hub.body_speed = 6e6
            while (number := sum(killed.values())) < kills:
                assert time.monotonic() - began < seconds, killed
                # alternately, and never far ahead: what is killed is a download as often as an upload
                if len(insist(server, f"{SAES}/jobs?live=true")) < 2:
                    (upload if number % 2 else download)()
                    (download if number % 2 else upload)()
                until(running, what=f"a job to run before kill {number}; {killed}")
                time.sleep(rng.uniform(0.0, 2.5))
                if (stage := running()) is None:
                    continue  # not between two jobs
                stages[stage] = stages.get(stage, 0) + 1
                which = rng.choice(sorted(killed))
                killed[which] += 1
                if which != "worker":
                    assert server.stop(kill=True) == -signal.SIGKILL
                if which != "server":  # else it ends by itself: its server is gone
                    for pid in workers_of(data):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
            hub.body_speed = None
            until(lambda: not insist(server, f"{SAES}/jobs?live=true"), seconds=120.0, what="all jobs to end")
            check_library(server, db, data, expected)
            up = hub.files("tester/mine") if uploads else {}
            for job_id, (folder, files) in uploads.items():
                job = insist(server, f"{SAES}/jobs/{job_id}")
                assert job["state"] == "done", (job["error"], job["attempts"])
                assert same_weights(up[f"{folder}/sae_weights.safetensors"], files["sae_weights.safetensors"])
            titles = [commit.title for commit in hub.history("tester/mine")] if uploads else []
            assert titles.count("Upload SAE") == len(uploads), "each upload is one commit, however often it began"
            with db.read() as session:
                attempts = sum(session.scalars(select(Job.attempts)))
        finally:
            if server.process is not None and server.process.poll() is None:
                server.stop()
            db.close()
        until(lambda: not workers_of(data), what="the workers to end")
        return {
            "killed": killed, "at": stages, "downloads": len(expected), "uploads": len(uploads), "attempts": attempts,
            "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip


@pytest.mark.slow
def test_three_kills(tmp_path: Path):
    found = run_rounds(tmp_path, 3, seed=1)
    print(found)
    assert sum(found["killed"].values()) == 3 and found["downloads"] >= 1


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tmp_path: Path):
    found = run_rounds(tmp_path, 20, seed=20)
    print(found)
    assert sum(found["at"].values()) == 20 and found["downloads"] >= 2 and found["uploads"] >= 1


@pytest.mark.slow
def test_fifty_downloads_queued_at_once(tmp_path: Path):
    settings = settings_for(tmp_path)
    db = Database(settings.database)
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
            check_library(server, db, settings.data_dir, {sae["id"]: sources[i % 10] for i, sae in enumerate(asked)})
            for i, sae in enumerate(asked):
                metadata = server.ask(f"{SAES}/{sae['id']}")["sae_metadata"]
                recorded = {file["path"]: file["sha256"] for file in metadata["files_downloaded"]}
                weights = sources[i % 10]["sae_weights.safetensors"]
                assert recorded["sae_weights.safetensors"] == hashlib.sha256(weights).hexdigest()
        finally:
            server.stop()


@pytest.mark.slow
def test_ctrl_c_ends_the_server_and_its_worker_and_the_job_goes_on_at_the_next_start(tmp_path: Path):
    settings = settings_for(tmp_path)
    db = Database(settings.database)
    files = sae_files(768, 2000, seed=3)
    with SlowHub(tmp_path) as hub:
        hub.add_repo("user/one", below("a", files))
        hub.body_speed = 4e6
        server = Server(environment(hub, settings, tmp_path / "hf"))
        server.start()
        sae = server.ask(f"{SAES}/download", {"repo_id": "user/one", "filepath": "a"})
        until(lambda: server.ask(f"{SAES}/jobs?sae_id={sae['id']}")[0]["bytes_done"] > 0, what="bytes to arrive")
        assert server.process is not None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(timeout=30) == 0
        assert workers_of(settings.data_dir) == []
        hub.body_speed = None
        server.start()
        until(lambda: not server.ask(f"{SAES}/jobs?live=true"), what="the download")
        check_library(server, db, settings.data_dir, {sae["id"]: files})
        assert server.stop() == 0
