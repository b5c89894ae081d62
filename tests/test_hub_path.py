"""The commands of the README as printed: for Pythia-70M and OpenWebText from a Hub on this machine that has the
built-in model and tales under those names, and on the built-in names without any Hub. Both give the same bytes."""

import csv
import io
import json
import os
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from loopback_hub import LoopbackHub, client_env, closed_endpoint
from safetensors.torch import load_file, save_file
from small_run import rows_without_rate

from mechint.builtin import PYTHIA_TINY
from mechint.builtin.tales import tale
from mechint.data import open_activations
from mechint.provenance import read_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATASET = "EleutherAI/pythia-70m", "Skylion007/openwebtext"
N_TEXTS, SHARD_SIZES = 80, (30, 25, 35)
SEED = 7

COLLECT = f"""collect_activations.py --model {{model}} --layer 3 --hook blocks.3.hook_resid_post --dataset {{dataset}}
    --num-texts {N_TEXTS} --output activations/activations_{N_TEXTS}.pt"""
TRAIN = f"""train_sae.py --activations-path activations/activations_{N_TEXTS}.pt --activation-dim 128
    --expansion {{expansion}} --lam 3 --epochs 200 --warmup-steps 20 --lambda-warmup-steps 40 --learning-rate 0.004
    --batch-size 256 --run-name {{expansion}}x"""
EVAL = "eval_sae.py --run-dir runs/4x --output eval.json"
ABLATE = """batch_ablate.py --checkpoint runs/4x/checkpoint.pt --config runs/4x/config.json
    --eval-texts-path eval_texts.txt --output runs/4x/ablation.csv"""
COMPARE = """compare_expansions.py --checkpoints runs/2x/checkpoint.pt runs/4x/checkpoint.pt --activation-dim 128
    --output runs/comparisons/2x_vs_4x.csv"""


def texts() -> list[str]:
    return [tale(i, "train", SEED).text for i in range(sum(SHARD_SIZES))]


def parquet(texts: list[str], first: int) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    table = pyarrow.table({"id": list(range(first, first + len(texts))), "text": texts})
    pyarrow.parquet.write_table(table, sink, row_group_size=10)
    return sink.getvalue()


class World(NamedTuple):
    """The hub, the commits of each repository (old, new), and a client's environment."""

    hub: LoopbackHub
    model: tuple[str, str]
    dataset: tuple[str, str]
    env: dict[str, str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("hub")
    old_model = folder / "old_model"
    shutil.copytree(PYTHIA_TINY, old_model)
    weights = load_file(old_model / "model.safetensors")
    weights["gpt_neox.embed_in.weight"] = weights["gpt_neox.embed_in.weight"] * 1.5
    save_file(weights, old_model / "model.safetensors", metadata={"format": "pt"})
    files, first = {}, 0
    for number, size in enumerate(SHARD_SIZES):
        files[f"plain_text/train-0000{number}-of-00003.parquet"] = parquet(texts()[first : first + size], first)
        first += size
    with LoopbackHub(folder) as hub:
        models = (hub.add_repo(MODEL, old_model), hub.commit(MODEL, PYTHIA_TINY))
        backwards = {"plain_text/train-00000-of-00003.parquet": parquet(texts()[::-1], 0)}
        datasets = (
            hub.add_repo(DATASET, backwards, type="dataset"),
            hub.commit(DATASET, files, type="dataset"),
        )
        hub.tag(MODEL, "first", models[0])
        hub.tag(DATASET, "first", datasets[0], type="dataset")
        env = {**hub.env(folder / "hf"), "OMP_NUM_THREADS": "1"}
        yield World(hub, models, datasets, env)


def write_eval_texts(folder: Path) -> list[str]:
    lines = [" ".join(tale(i, "heldout", SEED).text.split())[:80] for i in range(3)]
    (folder / "eval_texts.txt").write_text("\n".join(lines) + "\n")
    return lines


class Finished(NamedTuple):
    folder: Path
    stdout: dict[str, str]


def run_script(command: str, folder: Path, env: dict[str, str]) -> str:
    script, *flags = shlex.split(command)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *flags],
        cwd=folder, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def from_hub(world: World, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The commands, each a process of its own, in a folder that is not the repository."""
    folder = tmp_path_factory.mktemp("from_hub")
    write_eval_texts(folder)
    commands = {
        "collect": COLLECT.format(model="pythia-70m", dataset="openwebtext"),
        "train 2x": TRAIN.format(expansion=2),
        "train 4x": TRAIN.format(expansion=4),
        "eval": EVAL,
        "ablate": ABLATE,
        "compare": COMPARE,
    }
    return Finished(folder, {name: run_script(command, folder, world.env) for name, command in commands.items()})


def check_outputs(found: Finished) -> None:
    """What the five commands must leave and print, whatever the names were."""
    folder, out = found.folder, found.stdout
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    collected = f"activations/activations_{N_TEXTS}"
    run_files = ("config.json", "metrics.csv", "checkpoint.pt", "summary.json", "manifest.json")
    sae_files = ("sae/cfg.json", "sae/sae_weights.safetensors")
    assert names == {
        *(f"{collected}{end}" for end in (".pt", ".json", ".tokens.safetensors")),
        *(f"runs/{run}/{file}" for run in ("2x", "4x") for file in (*run_files, *sae_files)),
        *("eval_texts.txt", "eval.json", "runs/4x/ablation.csv", "runs/comparisons/2x_vs_4x.csv"),
        *("runs/comparisons/2x_vs_4x.latents.csv", "runs/comparisons/2x_vs_4x.pairs.csv"),
    }

    assert f"activation_path: {collected}.pt\nmetadata_path: {collected}.json\n" in out["collect"]
    sidecar = read_json(folder / f"{collected}.json")
    assert sidecar["config"]["num_texts"] == N_TEXTS and sidecar["activation_dim"] == 128
    rows = torch.load(folder / f"{collected}.pt", mmap=True, weights_only=True)
    assert rows.shape == (sidecar["num_vectors"], 128) and rows.dtype == torch.float32

    lines = out["train 4x"].splitlines()
    assert lines[0].startswith("step 0: loss=") and lines[lines.index("---") + 1].startswith("val_mse: ")
    assert "run_dir: runs/4x" in lines and "checkpoint_path: runs/4x/checkpoint.pt" in lines
    assert "config_path: runs/4x/config.json" in lines and "num_features: 512" in lines
    metrics = list(csv.DictReader((folder / "runs/4x/metrics.csv").open()))
    assert len(metrics) == 11 and float(metrics[-1]["mse"]) < 0.2 * float(metrics[0]["mse"])

    evaluated = read_json(folder / "eval.json")
    summary = read_json(folder / "runs/4x/summary.json")
    assert evaluated["val_mse"] == pytest.approx(summary["val_mse"], rel=1e-9)
    assert evaluated["notes"] == [] and "eval_output: eval.json" in out["eval"]
    assert f"ce_recovered_mean: {evaluated['ce_recovered_mean']:.6g}" in out["eval"].splitlines()
    assert 0 < evaluated["ce_clean"] < evaluated["ce_mean"] and evaluated["ce_clean"] < evaluated["ce_zero"]
    assert 0.8 < evaluated["ce_recovered_mean"] < 1.1 and 0.8 < evaluated["ce_recovered_zero"] < 1.1
    assert 1 < evaluated["l0"] < 400 and 0 < evaluated["fvu"] < 0.5

    ranking = list(csv.DictReader((folder / "runs/4x/ablation.csv").open()))
    assert sorted(int(row["feature_idx"]) for row in ranking) == list(range(512))
    kl = [float(row["mean_kl"]) for row in ranking]
    assert kl == sorted(kl, reverse=True) and 1e-4 < kl[0] < 5 and min(kl) >= 0
    assert {row["num_texts"] for row in ranking} == {"3"}
    assert ranking[0]["max_kl_prompt"] in (folder / "eval_texts.txt").read_text().splitlines()
    assert out["ablate"].splitlines()[-2:] == [
        "ablation_output: runs/4x/ablation.csv",
        f"top_feature: {ranking[0]['feature_idx']} mean_kl={kl[0]:.6f}",
    ]

    matches = list(csv.DictReader((folder / "runs/comparisons/2x_vs_4x.csv").open()))
    assert [int(row["left_feature"]) for row in matches] == list(range(256))
    assert all(0 <= int(row["right_feature"]) < 512 and -1 <= float(row["cosine_similarity"]) <= 1 for row in matches)
    assert "comparison_output: runs/comparisons/2x_vs_4x.csv" in out["compare"]


def test_five_commands_with_the_default_names(from_hub: Finished, world: World):
    check_outputs(from_hub)
    asked = {request.path for request in world.hub.seen()}
    assert {f"/{MODEL}/resolve/{world.model[1]}/model.safetensors"} <= asked
    parts = {
        f"/datasets/{DATASET}/resolve/{world.dataset[1]}/plain_text/train-0000{i}-of-00003.parquet" for i in range(3)
    }
    assert parts <= asked
    assert not world.hub.seen("OUTSIDE")


def test_records_name_the_commits(from_hub: Finished, world: World):
    sidecar = read_json(from_hub.folder / f"activations/activations_{N_TEXTS}.json")
    said = {"model_source": MODEL, "model_revision": world.model[1], "dataset_revision": world.dataset[1]}
    assert {key: sidecar["store"][key] for key in said} == said
    assert sidecar["config"]["model_source"] == MODEL and sidecar["config"]["dataset_name"] == "openwebtext"
    manifest = read_json(from_hub.folder / "runs/4x/manifest.json")
    recorded = manifest["inputs"]["activations"]
    assert {key: recorded[key] for key in said} == said
    assert recorded["sha256"] == sidecar["store"]["shards"][0]["sha256"]
    metadata = read_json(from_hub.folder / "runs/4x/sae/cfg.json")["metadata"]
    assert (metadata["model_revision"], metadata["model_name"]) == (world.model[1], "pythia-70m")


def test_verify_from_another_folder(from_hub: Finished, world: World, tmp_path: Path):
    command = [sys.executable, "-m", "mechint", "verify", str(from_hub.folder / "runs" / "4x")]
    done = subprocess.run(command, cwd=tmp_path, env=world.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    verdicts = [line.split(maxsplit=1) for line in done.stdout.splitlines()[:-1]]
    assert {verdict for verdict, _ in verdicts} == {"ok"} and len(verdicts) == 9
    assert done.stdout.endswith("every recorded hash holds\n")


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """The same commands with the built-in names, in this process: the scripts' files are run as programs."""
    folder = tmp_path_factory.mktemp("builtin")
    write_eval_texts(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        before = torch.get_num_threads()
        torch.set_num_threads(1)  # as the processes of the other fixture: sums over threads round differently
        commands = {
            "collect": COLLECT.format(model="builtin/pythia-tiny", dataset="builtin/tales") + f" --seed {SEED}",
            "train 2x": TRAIN.format(expansion=2),
            "train 4x": TRAIN.format(expansion=4),
            "eval": EVAL,
            "ablate": ABLATE,
            "compare": COMPARE,
        }
        stdout = {}
        for name, command in commands.items():
            script, *flags = shlex.split(command)
            patch.setattr(sys, "argv", [script, *flags])
            printed = io.StringIO()
            patch.setattr(sys, "stdout", printed)
            with pytest.raises(SystemExit) as ended:
                runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
            patch.setattr(sys, "stdout", sys.__stdout__)
            assert ended.value.code == 0, command
            stdout[name] = printed.getvalue()
        yield Finished(folder, stdout)
        torch.set_num_threads(before)


def test_five_commands_on_the_built_in_world(builtin: Finished):
    check_outputs(builtin)
    store = read_json(builtin.folder / f"activations/activations_{N_TEXTS}.json")["store"]
    assert (store["model_name"], store["dataset_name"]) == ("builtin/pythia-tiny", "builtin/tales")
    assert store["model_revision"] is None


def test_both_paths_give_the_same_bits(from_hub: Finished, builtin: Finished):
    """The model, the texts and the arithmetic are the same, so every byte of data is."""
    ours, theirs = (
        open_activations(found.folder / f"activations/activations_{N_TEXTS}.pt") for found in (from_hub, builtin)
    )
    assert ours.info["model_sha256"] == theirs.info["model_sha256"]
    assert ours.info["texts_sha256"] == theirs.info["texts_sha256"]
    assert torch.equal(ours.tensor(), theirs.tensor()) and ours.sha256 == theirs.sha256
    for name in (
        "runs/4x/checkpoint.pt",
        "runs/4x/metrics.csv",
        "runs/4x/ablation.csv",
        "runs/comparisons/2x_vs_4x.csv",
    ):
        if name.endswith("metrics.csv"):
            assert rows_without_rate(from_hub.folder / name) == rows_without_rate(builtin.folder / name)
        else:
            assert (from_hub.folder / name).read_bytes() == (builtin.folder / name).read_bytes(), name


# --- revisions, interruptions, and a Hub that is gone ----------------------------------------------------------------


def collect_words(folder: Path, name: str, *more: str) -> list[str]:
    words = ["--model", "pythia-70m", "--dataset", "openwebtext", "--num-texts", "12", "--output", str(folder / name)]
    return [sys.executable, str(ROOT / "scripts" / "collect_activations.py"), *words, *more]


def test_revisions_are_pinned_by_tag_and_by_commit(world: World, tmp_path: Path):
    """An old commit of either repository, named by its tag, gives what that commit holds."""
    flags = ["--revision", "first", "--model-revision", world.model[0]]
    done = subprocess.run(
        collect_words(tmp_path, "old", *flags), env=world.env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    old = open_activations(tmp_path / "old")
    assert (old.info["dataset_revision"], old.info["model_revision"]) == (world.dataset[0], world.model[0])

    from transformers import AutoModelForCausalLM, AutoTokenizer

    old_model = Path(world.env["HF_HOME"]).parent / "old_model"
    text = texts()[-1][:512]  # the old data set has the texts backwards
    ids = torch.tensor([[0, *AutoTokenizer.from_pretrained(old_model)(text).input_ids]])
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(old_model, dtype=torch.float32).eval()
        states = model(ids, output_hidden_states=True).hidden_states
    first = (old.text_ids == 0).nonzero().flatten()
    torch.testing.assert_close(old.rows(first), states[4][0, 1:], rtol=1e-5, atol=1e-5)


def test_a_killed_streaming_collection_goes_on_exactly(world: World, from_hub: Finished, tmp_path: Path):
    """Killed in the second parquet file; meanwhile both repositories get a newer commit."""
    words = collect_words(tmp_path, "store", "--checkpoint-every", "2", "--num-texts", str(N_TEXTS))
    process = subprocess.Popen(words, env=world.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    progress = tmp_path / "store" / "progress"
    deadline = time.monotonic() + 120
    while len(list(progress.glob("0*.json"))) < 17:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = len(list(progress.glob("0*.json")))
    assert SHARD_SIZES[0] / 2 < finished < N_TEXTS / 2, "not killed in the middle: nothing is tested"

    hub = world.hub
    hub.commit(
        DATASET, {"plain_text/train-00001-of-00003.parquet": parquet(["something else"] * 40, 0)}, type="dataset"
    )
    hub.commit(MODEL, {"model.safetensors": Path(world.env["HF_HOME"]).parent / "old_model" / "model.safetensors"})
    try:
        done = subprocess.run(words, env=world.env, capture_output=True, text=True, timeout=120)
    finally:  # the newest commit is again what the other tests take it for
        hub.repos["model", MODEL].refs["refs/heads/main"] = world.model[1]
        hub.repos["dataset", DATASET].refs["refs/heads/main"] = world.dataset[1]
    assert done.returncode == 0, done.stderr
    whole = open_activations(from_hub.folder / f"activations/activations_{N_TEXTS}.pt")
    resumed = open_activations(tmp_path / "store")
    assert (resumed.info["dataset_revision"], resumed.info["model_revision"]) == (world.dataset[1], world.model[1])
    for name in ("tokens", "text_ids", "positions"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    # padding is to the longest of a batch, which is another one in shards of two: rounding, no more
    torch.testing.assert_close(resumed.tensor(), whole.tensor(), rtol=1e-4, atol=1e-4)


def test_what_was_downloaded_once_needs_no_hub(world: World, from_hub: Finished, tmp_path: Path):
    """Evaluation offline takes the model from the cache, at the commit that the activations name."""
    env = client_env(closed_endpoint(), world.env["HF_HOME"], offline=True) | {"OMP_NUM_THREADS": "1"}
    flags = ["--run-dir", str(from_hub.folder / "runs" / "4x"), "--output", str(tmp_path / "eval.json")]
    script = str(ROOT / "scripts" / "eval_sae.py")
    done = subprocess.run([sys.executable, script, *flags], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads(path.read_text()) for path in (tmp_path / "eval.json", from_hub.folder / "eval.json"))
    same = ("ce_clean", "ce_sae", "ce_recovered_mean", "val_mse", "notes")
    assert {key: ours[key] for key in same} == {key: theirs[key] for key in same}


def test_nothing_asked_for_the_network_outside(world: World):
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert world.hub.requests and not world.hub.seen("OUTSIDE")
