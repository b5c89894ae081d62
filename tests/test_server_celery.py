"""The worker as many machines run it: Celery's own command, with its prefork pool, on whichever broker there is."""

import hashlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("celery")
pytest.importorskip("sqlalchemy")

from serving import SlowHub, below, ended, environment, sae_files, settings_for  # noqa: E402

from mechint.server import library  # noqa: E402
from mechint.server.models import SharedSAE  # noqa: E402

REPO = "lab/saes"


@pytest.mark.slow
def test_celerys_command_takes_jobs_of_its_queue_alone(tmp_path: Path):
    settings = settings_for(tmp_path, share_hub_token=False)
    with SlowHub(tmp_path) as hub:
        hub.add_repo(REPO, below("a", sae_files(seed=1)) | below("b", sae_files(seed=2)))
        env = environment(hub, settings, tmp_path / "hf")
        service = library.open_service(settings)  # the tables are there before the worker is
        command = [sys.executable, "-m", "celery", "-A", "mechint.server.celery_app", "worker"]
        log = open(tmp_path / "celery.log", "wb")  # noqa: SIM115
        process = subprocess.Popen(
            [*command, "-Q", "sae", "--loglevel=info", "--concurrency=2"], env=env, stdout=log, stderr=log
        )
        try:
            asked = [library.create_download(service, repo_id=REPO, filepath=name) for name in ("a", "b")]
            jobs = [ended(service, job.id) for _, job in asked]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)
            log.close()
        served = hub.files(REPO)
        with service.db.read() as session:
            for (sae, _), job, name in zip(asked, jobs, ("a", "b"), strict=True):
                assert (job.state, job.error) == ("done", None), (tmp_path / "celery.log").read_text()[-4000:]
                found = session.get(SharedSAE, sae.id)
                assert found is not None and found.status == "ready"
                weights = settings.data_dir / "saes" / sae.id / "original" / "sae_weights.safetensors"
                expected = hashlib.sha256(served[f"{name}/sae_weights.safetensors"]).hexdigest()
                assert hashlib.sha256(weights.read_bytes()).hexdigest() == expected
        service.db.close()
    said = (tmp_path / "celery.log").read_text()
    assert "concurrency: 2 (prefork)" in said and "exchange=sae" in said, said[:2000]
    assert process.returncode == 0, said[-4000:]
