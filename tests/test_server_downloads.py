"""Downloads, uploads and imports: a real worker process, the real Hub client, a loopback Hub."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("celery")
pytest.importorskip("sqlalchemy")

from serving import (
    SlowHub,
    below,
    ended,
    environment,
    files_under,
    sae_files,
    same_weights,
    settings_for,
    until,
    worker,
)  # noqa: E402

from mechint.formats.convert import load  # noqa: E402
from mechint.server import library  # noqa: E402
from mechint.server.errors import ServiceError  # noqa: E402
from mechint.server.models import Job, SharedSAE  # noqa: E402

REPO = "jbloom/GPT2-Small-SAEs"


class World(NamedTuple):
    hub: SlowHub
    service: library.Service
    folder: Path  # the data folder
    allowed: Path
    runs: Path
    env: dict[str, str]
    worker: Any


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("service")
    (root / "allowed").mkdir()
    (root / "runs").mkdir()
    settings = settings_for(root, runs_root=root / "runs", import_roots=(root / "allowed",), share_hub_token=False)
    with SlowHub(root) as hub:
        files = {"README.md": "# SAEs", "pytorch_model.bin": b"\1" * 3000, "model.safetensors": b"\2" * 3000}
        for layer in (1, 6, 10):
            files |= below(f"layer_{layer}", sae_files(768, 96, seed=layer, model_name="gpt2-small"))
        files["layer_6/README.md"] = "more"
        files["layer_6/optimizer.pt"] = b"\3" * 2000
        hub.add_repo(REPO, files)
        hub.add_repo("tester/private", below("a", sae_files(seed=3)), private=True)
        env = environment(hub, settings, root / "hf")
        service = library.open_service(settings)
        with worker(env) as process:
            yield World(hub, service, root / "data", root / "allowed", root / "runs", env, process)
        service.db.close()


def download(world: World, filepath: str, repo_id: str = REPO, **more: Any) -> tuple[SharedSAE, Job]:
    """The SAE and the job once that is over."""
    sae, job = library.create_download(world.service, repo_id=repo_id, filepath=filepath, **more)
    job = ended(world.service, job.id)
    with world.service.db.read() as session:
        return library.get_sae(session, sae.id), job


def test_download_arrives_converted_with_its_original(world: World):
    sae, job = download(world, "layer_6", name="GPT2 Layer 6 SAE", description="resid", model_name="gpt2")
    assert (job.state, job.error, job.progress, job.stage) == ("done", None, 100.0, "complete")
    assert (sae.status, sae.progress, sae.error_message) == ("ready", 100.0, None)
    assert (sae.name, sae.description, sae.model_name) == ("GPT2 Layer 6 SAE", "resid", "gpt2")
    assert (sae.layer, sae.hook_type, sae.hook_name) == (6, "residual", "blocks.6.hook_resid_pre")
    assert (sae.d_model, sae.n_features, sae.architecture) == (768, 96, "standard")
    assert (sae.format, sae.source, sae.local_path) == ("community_standard", "huggingface", f"saes/{sae.id}")
    folder = world.folder / "saes" / sae.id
    original = {name: (folder / "original" / name).read_bytes() for name in files_under(folder / "original")}
    served = world.hub.files(REPO)
    assert original == {name: served[f"layer_6/{name}"] for name in ("cfg.json", "sae_weights.safetensors")}
    assert sae.file_size_bytes == sum(map(len, original.values())) == job.bytes_total == job.bytes_done
    recorded = {file["path"]: file["sha256"] for file in sae.sae_metadata["files_downloaded"]}
    assert recorded["sae_weights.safetensors"] == hashlib.sha256(original["sae_weights.safetensors"]).hexdigest()
    assert sae.sae_metadata["commit_hash"] == world.hub.history(REPO)[0].sha
    assert load(folder / "sae")[0].name == "mechint"
    certificate = json.loads((folder / "sae" / "certificate.json").read_text())
    assert certificate["holds"] and certificate["source"]["repo_id"] == REPO
    assert str(world.folder) not in json.dumps(certificate)
    assert not (world.folder / "staging" / job.id).exists()


def test_only_the_folder_that_was_asked_for_is_fetched(world: World):
    before = len(world.hub.requests)
    sae, job = download(world, "layer_1/")
    assert job.state == "done" and sae.layer == 6  # of its cfg.json
    paths = [r.path for r in world.hub.requests[before:] if "/resolve/" in r.path]
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for path in paths}
    assert fetched == {"layer_1/cfg.json", "layer_1/sae_weights.safetensors"}


@pytest.mark.parametrize(
    ("filepath", "repo_id", "more", "code", "words"),
    [
        ("a", "no/such", {}, "repository_not_found", "Repository not found: no/such: check repo_id, provide access"),
        ("a", "tester/private", {}, "repository_not_found", "Repository not found: tester/private"),
        ("a", "tester/private", {"access_token": "hf_of_somebody_else"}, "forbidden", "does not accept"),
        ("layer_2", REPO, {}, "path_not_found", "Path not found in repository: layer_2"),
        ("layer_6", REPO, {"revision": "v9"}, "revision_not_found", "Revision not found: v9"),
        ("README.md", REPO, {}, "config_not_found", "Config file not found"),
        (".", REPO, {}, "several_saes", "layer_1, layer_10, layer_6"),
        ("layer_6", REPO, {"model_name": "gpt2-medium"}, "dimension_mismatch", "gpt2-medium has 1024"),
    ],
)
def test_failures_have_names_and_remedies(
    world: World, filepath: str, repo_id: str, more: dict[str, str], code: str, words: str
):
    before = len(world.hub.seen("GET", r"/storage/"))
    sae, job = download(world, filepath, repo_id, **more)
    assert (job.state, job.error_code) == ("error", code)
    assert words in (job.error or "") and sae.error_message == job.error and sae.status == "error"
    assert not (world.folder / "saes" / sae.id).exists()
    assert len(world.hub.seen("GET", r"/storage/")) == before, "no weights are fetched for what is known beforehand"


def test_private_repository_with_its_owners_token_which_is_gone_afterwards(world: World):
    sae, job = download(world, "a", "tester/private", access_token=world.hub.token)
    assert (sae.status, job.token_cipher, job.token_until) == ("ready", None, None)
    for path in world.folder.rglob("*"):
        if path.is_file():
            assert world.hub.token.encode() not in path.read_bytes(), path


def test_token_of_one_request_is_not_used_for_the_next(world: World):
    download(world, "a", "tester/private", access_token=world.hub.token)
    before = len(world.hub.requests)
    assert download(world, "a", "tester/private")[1].error_code == "repository_not_found"
    assert not [r for r in world.hub.requests[before:] if "authorization" in r.headers]


def test_damaged_bytes_are_not_filed_and_are_fetched_again(world: World):
    files = sae_files(32, 64, seed=8)
    world.hub.add_repo("tester/damaged", below("a", files))
    sha256 = hashlib.sha256(files["sae_weights.safetensors"]).hexdigest()
    blob = world.hub.blobs.path(sha256)
    blob.write_bytes(files["sae_weights.safetensors"][:-4] + b"\0\0\0\1")
    sae, job = library.create_download(world.service, repo_id="tester/damaged", filepath="a")

    def now() -> Job:
        with world.service.db.read() as session:
            return library.get_job(session, job.id)

    until(lambda: "arrived damaged" in now().message, what="the damage to be seen")
    assert now().state == "queued" and not (world.folder / "saes" / sae.id).exists()
    blob.write_bytes(files["sae_weights.safetensors"])
    assert ended(world.service, job.id).state == "done"
    filed = world.folder / "saes" / sae.id / "original" / "sae_weights.safetensors"
    assert filed.read_bytes() == files["sae_weights.safetensors"]


def test_rate_limit_waits_as_long_as_the_hub_says(world: World):
    world.hub.add_repo("tester/limited", below("a", sae_files(seed=9)))
    # the client tries some times by itself first
    world.hub.fail_next(1, 429, match="GET /api/models/tester/limited", headers={"Retry-After": "2"})
    sae, job = library.create_download(world.service, repo_id="tester/limited", filepath="a")

    def waiting() -> bool:
        with world.service.db.read() as session:
            now = library.get_job(session, job.id)
            return "Rate limit exceeded" in now.message and now.state == "queued"

    until(waiting, what="the rate limit to be seen")
    assert ended(world.service, job.id).attempts == 2


def test_cancel_in_the_middle_stops_the_transfer_and_leaves_nothing(world: World):
    world.hub.add_repo("tester/long", below("a", sae_files(768, 2000, seed=10)))
    world.hub.body_speed = 4e6
    try:
        sae, job = library.create_download(world.service, repo_id="tester/long", filepath="a")

        def middle() -> bool:
            with world.service.db.read() as session:
                now = library.get_job(session, job.id)
                return 0 < now.bytes_done < (now.bytes_total or 0)

        until(middle, what="bytes to arrive")
        assert [job.id] == [one.id for one in library.cancel(world.service, sae_id=sae.id)]
        job = ended(world.service, job.id, seconds=20.0)
    finally:
        world.hub.body_speed = None
    assert job.state == "cancelled" and job.bytes_done < (job.bytes_total or 0)
    until(lambda: not (world.folder / "staging" / job.id).exists(), what="the staged bytes to go")
    assert not (world.folder / "saes" / sae.id).exists()
    with pytest.raises(ServiceError, match="Nothing to cancel"):
        library.cancel(world.service, sae_id=sae.id)
    again = library.retry(world.service, sae.id)
    assert ended(world.service, again.id).state == "done"


def test_progress_counts_bytes_and_never_goes_back(world: World):
    world.hub.add_repo("tester/seen", below("a", sae_files(768, 1500, seed=11)))
    world.hub.body_speed = 8e6
    seen: list[tuple[int, float, str, str]] = []
    try:
        sae, job = library.create_download(world.service, repo_id="tester/seen", filepath="a")

        def look() -> bool:
            with world.service.db.read() as session:
                now, row = library.get_job(session, job.id), library.get_sae(session, sae.id)
                seen.append((now.bytes_done, now.progress, now.message, row.status))
            return now.state == "done"

        until(look)
    finally:
        world.hub.body_speed = None
    middle = [(done, progress, text) for done, progress, text, _ in seen if 0 < progress < 90]
    total = sum(map(len, sae_files(768, 1500, seed=11).values()))
    assert len(set(middle)) >= 3
    for done, progress, text in middle:
        assert progress == pytest.approx(90 * done / total) and text == f"Downloading: {progress:.1f}%"
    assert [p for _, p, _, _ in seen] == sorted(p for _, p, _, _ in seen)
    order = list(dict.fromkeys(status for *_, status in seen))
    assert order[0] in ("pending", "downloading") and order[-1] == "ready" and "downloading" in order


@pytest.mark.slow
def test_worker_that_is_told_to_end_puts_its_job_back_and_the_next_goes_on_where_it_was(world: World, tmp_path: Path):
    """The job of this test is in a service of its own: the world's worker must not take it."""
    settings = settings_for(tmp_path)
    service = library.open_service(settings)
    env = environment(world.hub, settings, tmp_path / "hf")
    world.hub.add_repo("tester/resumed", below("a", sae_files(768, 2500, seed=12)))
    world.hub.body_speed = 5e6
    try:
        sae, job = library.create_download(service, repo_id="tester/resumed", filepath="a")

        def at_half() -> bool:
            with service.db.read() as session:
                now = library.get_job(session, job.id)
                return (now.bytes_total or 0) * 0.4 < now.bytes_done < (now.bytes_total or 0)

        with worker(env) as process:
            until(at_half, what="half of the bytes")
            process.terminate()
            assert process.wait(timeout=20) == 0
        with service.db.read() as session:
            now = library.get_job(session, job.id)
            assert (now.state, now.attempts, now.worker_id) == ("queued", 0, None)
    finally:
        world.hub.body_speed = None
    sent = len(world.hub.seen("GET", "/storage/"))
    with worker(env):
        assert ended(service, job.id).state == "done"
    resumed = world.hub.seen("GET", "/storage/")[sent:]
    assert [r.headers.get("range", "")[:6] for r in resumed] == ["bytes="]
    assert not resumed[0].headers["range"].startswith("bytes=0-")
    service.db.close()


def test_upload_is_one_commit_in_the_community_standard_and_again_none(world: World):
    sae, _ = download(world, "layer_10")
    arguments: dict[str, Any] = {"repo_id": "tester/my-sae", "filepath": "layer_10", "access_token": world.hub.token}
    job = library.create_upload(
        world.service, sae_id=sae.id, create_repo=True, private=True, commit_message="Initial upload", **arguments
    )
    job = ended(world.service, job.id)
    assert (job.state, job.error, job.token_cipher) == ("done", None, None)
    history = world.hub.history("tester/my-sae")
    assert history[0].title == "Initial upload" and job.result["commit_hash"] == history[0].sha
    assert job.result["url"].endswith("/tester/my-sae/tree/main/layer_10")
    assert world.hub.repos["model", "tester/my-sae"].private
    up = world.hub.files("tester/my-sae")
    assert {name for name in up if name.startswith("layer_10/")} == {
        "layer_10/cfg.json", "layer_10/sae_weights.safetensors", "layer_10/certificate.json"
    }  # fmt: skip
    assert same_weights(up["layer_10/sae_weights.safetensors"], sae_files(768, 96, seed=10)["sae_weights.safetensors"])
    assert str(world.folder).encode() not in b"".join(up.values())
    again = ended(world.service, library.create_upload(world.service, sae_id=sae.id, **arguments).id)
    assert again.result["commit_hash"] == history[0].sha and len(world.hub.history("tester/my-sae")) == len(history)
    with world.service.db.read() as session:
        assert library.get_sae(session, sae.id).status == "ready"


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"repo_id": "tester/not-there"}, "repository_not_found"),
        ({"repo_id": "somebody/else", "create_repo": True}, "forbidden"),
        ({"repo_id": "tester/x", "create_repo": True, "access_token": "hf_wrong"}, "forbidden"),
    ],
)
def test_upload_that_fails_leaves_the_sae_ready(world: World, more: dict[str, Any], code: str):
    sae, _ = download(world, "layer_10")
    arguments = {"access_token": world.hub.token, "filepath": "layer_10"} | more
    job = ended(world.service, library.create_upload(world.service, sae_id=sae.id, **arguments).id)
    assert (job.state, job.error_code) == ("error", code)
    assert world.hub.token not in (job.error or "") and "hf_wrong" not in (job.error or "")
    with world.service.db.read() as session:
        assert library.get_sae(session, sae.id).status == "ready"


def test_upload_needs_a_token_and_an_sae_that_is_ready(world: World):
    sae, _ = download(world, "layer_2")
    with pytest.raises(ServiceError, match="not ready"):
        library.create_upload(world.service, sae_id=sae.id, repo_id="a/b", filepath="c", access_token="hf_x")
    with pytest.raises(ServiceError, match="needs a token"):
        library.create_upload(world.service, sae_id=sae.id, repo_id="a/b", filepath="c")


def test_import_from_a_file(world: World):
    folder = world.allowed / "my_sae"
    folder.mkdir()
    for name, content in sae_files(768, 80, seed=4).items():
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to("/etc/passwd")
    sae, job = library.create_import_file(
        world.service, file_path=str(folder), name="Local SAE", format="saelens", model_name="gpt2", layer=7
    )
    assert ended(world.service, job.id).state == "done"
    with world.service.db.read() as session:
        sae = library.get_sae(session, sae.id)
    assert (sae.status, sae.source, sae.format, sae.layer) == ("ready", "local", "community_standard", 7)
    assert files_under(world.folder / "saes" / sae.id / "original") == {"cfg.json", "sae_weights.safetensors"}
    wrong, job = library.create_import_file(world.service, file_path=str(folder), name="Wrong", format="gemma_scope")
    job = ended(world.service, job.id)
    assert job.error_code == "config_not_found" and "not gemma_scope" in (job.error or "")


def test_import_from_a_run_and_not_twice(world: World):
    run = world.runs / "train_abc123"
    make_run(run)
    there = library.available_training(world.service, "train_abc123")
    assert [(sae["layer"], sae["hook_type"], sae["path"]) for sae in there["available_saes"]] == [
        (3, "residual", "train_abc123")
    ]
    found = library.create_import_training(world.service, training_id="train_abc123", name="My Trained SAE")
    with world.service.db.read() as session:
        job = library.list_jobs(session, sae_id=found.saes[0].id)[0]
    job = ended(world.service, job.id)
    assert (job.state, job.error) == ("done", None)
    with world.service.db.read() as session:
        sae = library.get_sae(session, found.saes[0].id)
    assert (sae.name, sae.source, sae.training_id, sae.status) == ("My Trained SAE", "trained", "train_abc123", "ready")
    assert sae.sae_metadata["final_l0_sparsity"] == 12.5 and sae.sae_metadata["run"] == "train_abc123"
    there = library.available_training(world.service, "train_abc123")
    assert [sae["sae_id"] for sae in there["imported_saes"]] == [sae.id]
    with pytest.raises(ServiceError, match="Imported already"):
        library.create_import_training(world.service, training_id="train_abc123")
    # whoever changes a run after its manifest was written is found out
    library.delete_sae(world.service, sae.id)
    (run / "checkpoint.pt").write_bytes(b"else")
    found = library.create_import_training(world.service, training_id="train_abc123")
    with world.service.db.read() as session:
        job = library.list_jobs(session, sae_id=found.saes[0].id)[0]
    assert ended(world.service, job.id).error_code == "run_changed"


def make_run(folder: Path) -> None:
    """A finished run directory as training writes one, of a random SAE."""
    import torch

    from mechint.provenance import sha256_file, write_json
    from mechint.sae import build_sae, save_checkpoint

    torch.manual_seed(0)
    sae = build_sae("standard", 16, 32)
    sae.metadata = {"hook_name": "blocks.3.hook_resid_post", "model_name": "builtin/pythia-tiny", "processing": "raw"}
    folder.mkdir(parents=True)
    save_checkpoint(sae, folder / "checkpoint.pt")
    sae.save_model(folder / "sae")
    config = {"hook_name": "blocks.3.hook_resid_post", "epochs": 5, "dataset_name": "builtin/tales"}
    write_json(folder / "config.json", config)
    write_json(folder / "summary.json", {"l0": 12.5})
    (folder / "state").mkdir()
    (folder / "state" / "state.pt").write_bytes(b"not for the library")
    names = ("checkpoint.pt", "config.json", "summary.json", "sae/cfg.json", "sae/sae_weights.safetensors")
    outputs = {name: sha256_file(folder / name) for name in names}
    manifest = {"config": config, "summary": {"l0": 12.5}, "outputs": outputs, "git_commit": "abc"}
    write_json(folder / "manifest.json", manifest)


def test_delete_in_the_middle_of_a_download_leaves_nothing(world: World):
    world.hub.add_repo("tester/deleted", below("a", sae_files(768, 2000, seed=14)))
    world.hub.body_speed = 4e6
    try:
        sae, job = library.create_download(world.service, repo_id="tester/deleted", filepath="a")

        def running() -> bool:
            with world.service.db.read() as session:
                return library.get_job(session, job.id).bytes_done > 0

        until(running, what="bytes to arrive")
        library.delete_sae(world.service, sae.id)
        assert ended(world.service, job.id, seconds=20.0).state == "cancelled"
    finally:
        world.hub.body_speed = None
    until(lambda: not (world.folder / "staging" / job.id).exists(), what="the staged bytes to go")
    assert not (world.folder / "saes" / sae.id).exists()
    with world.service.db.read() as session, pytest.raises(ServiceError, match="SAE not found"):
        library.get_sae(session, sae.id)


def test_delete_with_and_without_the_files(world: World):
    (first, _), (second, _) = download(world, "layer_1"), download(world, "layer_1")
    library.delete_sae(world.service, first.id)
    library.delete_sae(world.service, second.id, delete_files=False)
    assert not (world.folder / "saes" / first.id).exists() and (world.folder / "saes" / second.id).is_dir()
    found = library.delete_saes(world.service, [first.id, second.id, "sae_000000000000"])
    assert found.deleted_ids == [] and len(found.errors) == 3
    from mechint.server.storage import sweep

    sweep(world.service.settings, world.service.db)
    assert (world.folder / "saes" / second.id).is_dir()
    shutil.rmtree(world.folder / "saes" / second.id)


@pytest.mark.slow
def test_worker_killed_in_the_middle_is_followed_by_another(world: World, tmp_path: Path):
    settings = settings_for(tmp_path)
    service = library.open_service(settings)
    env = environment(world.hub, settings, tmp_path / "hf")
    world.hub.add_repo("tester/killed", below("a", sae_files(768, 1500, seed=15)))
    world.hub.gate.clear()
    sae, job = library.create_download(service, repo_id="tester/killed", filepath="a")

    def running() -> bool:
        with service.db.read() as session:
            return library.get_job(session, job.id).stage == "download"

    with worker(env) as process:
        until(running, what="the download to begin")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    world.hub.gate.set()
    with worker(env):
        job = ended(service, job.id)
    assert (job.state, job.attempts) == ("done", 2)
    service.db.close()


@pytest.mark.slow
def test_worker_that_was_away_too_long_finds_its_job_taken_and_changes_nothing(world: World, tmp_path: Path):
    """Stopped, not killed: it comes back in the middle of its download, when another has done the job."""
    settings = settings_for(tmp_path, lease_seconds=3.0)
    service = library.open_service(settings)
    env = environment(world.hub, settings, tmp_path / "hf")
    files = sae_files(768, 1500, seed=16)
    world.hub.add_repo("tester/away", below("a", files))
    world.hub.body_speed = 2e6
    sae, job = library.create_download(service, repo_id="tester/away", filepath="a")

    def now() -> Job:
        with service.db.read() as session:
            return library.get_job(session, job.id)

    with worker(env) as first:
        try:
            until(lambda: now().bytes_done > 0, what="bytes to arrive")
            os.kill(first.pid, signal.SIGSTOP)
            world.hub.body_speed = None
            with worker(env) as second:
                done = ended(service, job.id)
                assert (done.state, done.attempts) == ("done", 2) and first.poll() is None
                filed = settings.data_dir / "saes" / sae.id
                before = {name: (filed / name).stat().st_mtime_ns for name in files_under(filed)}
                seq = done.seq
                os.kill(first.pid, signal.SIGCONT)
                # it is of use again
                other = library.create_download(service, repo_id="tester/away", filepath="a")[1]
                second.terminate()
                assert ended(service, other.id).state == "done"
        finally:
            world.hub.body_speed = None
            os.kill(first.pid, signal.SIGCONT)
    assert now().seq == seq and {name: (filed / name).stat().st_mtime_ns for name in files_under(filed)} == before
    assert (filed / "original" / "sae_weights.safetensors").read_bytes() == files["sae_weights.safetensors"]
    from mechint.server.storage import sweep

    sweep(settings, service.db)
    assert files_under(settings.staging_dir) == set()
    service.db.close()
