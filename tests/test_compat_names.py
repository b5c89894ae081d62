"""Every name that code written for the first version imports, from where it imported it, called as it called it."""

import csv
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HOOK
from torch import Tensor

from mechint.models import LanguageModel, load_model
from mechint.sae import SparseAutoEncoder, save_checkpoint

NAMES = {
    "mechint": "SAETrainConfig SparseAutoEncoder SAEloss",
    "mechint.sae": "SparseAutoEncoder SAEloss",
    "mechint.config": "SAETrainConfig",
    "mechint.analysis": """collect_top_activations search_token feature_consistency_score decoder_cosine_similarity
        top_decoder_pairs""",
    "mechint.ablation": """build_transformer_model load_sae_checkpoint single_feature_ablation_hook compute_text_kl
        rank_features_by_ablation save_ablation_rows""",
    "mechint.eval": """collect_feature_activity evaluate_sae print_eval_summary save_eval_summary append_metrics_row""",
    "mechint.data": """detect_device set_global_seed load_activation_tensor deterministic_split_indices
        load_activations_with_splits random_batch_iterator split_batch_iterator iter_activation_batches make_run_dir
        collect_activations write_run_manifest iter_texts_from_path get_git_commit timestamp_slug""",
}
# The parameters that compat callers pass, in their order; further ones of ours must have defaults.
SIGNATURES = {
    "mechint.analysis.collect_top_activations": ("sae", "acts", "k", "batch_size", "device"),
    "mechint.analysis.search_token": ("feature_texts", "query"),
    "mechint.analysis.feature_consistency_score": ("tokens",),
    "mechint.analysis.decoder_cosine_similarity": ("sae",),
    "mechint.analysis.top_decoder_pairs": ("sae", "top_k"),
    "mechint.ablation.load_sae_checkpoint": ("path", "activation_dim", "expansion", "device"),
    "mechint.ablation.rank_features_by_ablation": (
        *("sae", "model", "hook_name", "texts", "feature_subset", "show_progress"),
    ),
    "mechint.data.load_activation_tensor": ("path", "mmap"),
    "mechint.data.deterministic_split_indices": ("n_rows", "val_fraction", "seed"),
    "mechint.sae.SAEloss": ("x", "x_hat", "feature_acts", "lam"),
}


@pytest.mark.parametrize(("module", "names"), NAMES.items())
def test_names_are_where_they_were(module: str, names: str):
    found = importlib.import_module(module)
    for name in names.split():
        assert callable(getattr(found, name)), f"{module}.{name}"
        assert name in dir(found)
        namespace: dict[str, Any] = {}
        exec(f"from {module} import {name}", namespace)


@pytest.mark.parametrize(("path", "expected"), SIGNATURES.items())
def test_parameters_are_in_their_old_order(path: str, expected: tuple[str, ...]):
    module, name = path.rsplit(".", 1)
    parameters = list(inspect.signature(getattr(importlib.import_module(module), name)).parameters.values())
    assert tuple(p.name for p in parameters[: len(expected)]) == expected
    assert all(p.default is not p.empty for p in parameters[len(expected) :])


def test_defaults_of_old_parameters():
    from mechint.ablation import load_sae_checkpoint
    from mechint.analysis import collect_top_activations, top_decoder_pairs
    from mechint.data import load_activation_tensor

    def default(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    assert default(collect_top_activations, "k") == 20 and default(collect_top_activations, "batch_size") == 4096
    assert default(top_decoder_pairs, "top_k") == 20 and default(load_activation_tensor, "mmap") is True
    assert default(load_sae_checkpoint, "expansion") is None


def test_unknown_names_say_what_there_is():
    for module in ("mechint", "mechint.data"):
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nonsense'; it has "):
            _ = importlib.import_module(module).nonsense


def test_importing_the_package_imports_nothing_heavy():
    heavy = ["torch", "transformers", "datasets", "pandas", "matplotlib", "transformer_lens", "numpy"]
    code = f"import mechint, mechint.config, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- and they are called as the first version's scripts and notebooks called them -------------------------------------


@pytest.fixture(scope="module")
def sae() -> SparseAutoEncoder:
    torch.manual_seed(0)
    return SparseAutoEncoder(32, 4)


@pytest.fixture(scope="module")
def acts() -> Tensor:
    return torch.randn(300, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tiny_neox_dir: Path) -> LanguageModel:
    return load_model(str(tiny_neox_dir), processing="centred", device="cpu")


def test_model_and_loss(sae: SparseAutoEncoder, acts: Tensor):
    from mechint import SAEloss, SAETrainConfig
    from mechint import SparseAutoEncoder as FromTop

    assert FromTop is SparseAutoEncoder
    x_hat, f = sae(acts)
    torch.testing.assert_close(f, torch.relu((acts - sae.b_pre) @ sae.W_enc + sae.b_enc))
    torch.testing.assert_close(x_hat, f @ sae.W_dec + sae.b_pre)
    loss, mse, l1 = SAEloss(acts, x_hat, f, 3.0)
    torch.testing.assert_close(mse, (x_hat - acts).square().mean())
    torch.testing.assert_close(loss, mse + 3.0 * f.abs().mean())
    assert l1 == f.abs().mean()
    config = SAETrainConfig(activation_dim=32, expansion=4)
    assert config.num_features == 128 and config.with_overrides(epochs=None, l1_lambda=2.0).l1_lambda == 2.0


def test_analysis_calls(sae: SparseAutoEncoder, acts: Tensor):
    from mechint.analysis import (
        collect_top_activations,
        decoder_cosine_similarity,
        feature_consistency_score,
        search_token,
        top_decoder_pairs,
    )

    values, rows = collect_top_activations(sae, acts, k=5, batch_size=64, device="cpu")
    with torch.no_grad():
        expected = sae.encode(acts).T.topk(5)
    assert values.shape == rows.shape == (128, 5)
    torch.testing.assert_close(values, expected.values)
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(acts)[rows[:, 0], torch.arange(128)], values[:, 0])
    few, unfilled = collect_top_activations(sae, acts[:3], k=5)
    assert bool((few[:, 3:] == -torch.inf).all()) and bool((unfilled[:, 3:] == -1).all())

    similarity = decoder_cosine_similarity(sae)
    pairs = top_decoder_pairs(sae, top_k=7)
    assert similarity.shape == (128, 128) and len(pairs) == 7
    upper = similarity.triu(1)
    assert pairs[0][:2] == divmod(int(upper.argmax()), 128) and pairs[0][2] == pytest.approx(
        float(upper.max()), abs=1e-6
    )

    assert search_token({0: [" the", "cat"], 5: ["The"], 7: ["other"]}, "the") == [0, 7]
    assert feature_consistency_score(["a", "a", "b", "a"]) == 0.75


def test_ablation_calls(sae: SparseAutoEncoder, model: LanguageModel, tiny_neox_dir: Path, tmp_path: Path):
    from mechint.ablation import (
        build_transformer_model,
        compute_text_kl,
        load_sae_checkpoint,
        rank_features_by_ablation,
        save_ablation_rows,
        single_feature_ablation_hook,
    )

    path = tmp_path / "checkpoint.pt"
    save_checkpoint(sae, path)
    with pytest.warns(UserWarning, match="centred residual"):
        loaded = load_sae_checkpoint(path, 32, expansion=4, device="cpu")
    assert torch.equal(loaded.W_dec, sae.W_dec)

    rows = rank_features_by_ablation(loaded, model, HOOK, ["the cat sat", "the dog ran"], [3, 1, 2], False)
    assert sorted(row["feature_idx"] for row in rows) == [1, 2, 3]
    columns = [
        "feature_idx",
        "mean_kl",
        "max_kl",
        "max_kl_prompt",
        "max_kl_token",
        "max_kl_token_position",
        "num_texts",
    ]
    save_ablation_rows(rows, tmp_path / "ablation.csv")
    with open(tmp_path / "ablation.csv") as file:
        saved = list(csv.DictReader(file))
    assert list(saved[0])[:7] == columns
    assert [float(row["mean_kl"]) for row in saved] == [row["mean_kl"] for row in rows]
    found = compute_text_kl(loaded, model, HOOK, "the cat sat", rows[0]["feature_idx"])
    assert isinstance(found, dict) and len(found["kl"]) == len(found["tokens"])

    bridge = build_transformer_model(str(tiny_neox_dir), "cpu")
    tokens = bridge.to_tokens("the cat sat")
    assert tokens[0].tolist() == found["token_ids"]  # BOS first, as it always was
    hook = single_feature_ablation_hook(loaded, rows[0]["feature_idx"])
    with torch.no_grad():
        clean = bridge(tokens).log_softmax(-1)
        ablated = bridge.run_with_hooks(tokens, fwd_hooks=[(HOOK, hook)]).log_softmax(-1)
    kl = (clean.exp() * (clean - ablated)).sum(-1)[0]
    torch.testing.assert_close(kl, torch.tensor(found["kl"], dtype=kl.dtype), atol=2e-6, rtol=1e-3)


def test_eval_calls(sae: SparseAutoEncoder, acts: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from mechint.eval import (
        append_metrics_row,
        collect_feature_activity,
        evaluate_sae,
        print_eval_summary,
        save_eval_summary,
    )

    alive = collect_feature_activity(sae, acts, batch_size=128, device="cpu")
    with torch.no_grad():
        f = sae.encode(acts)
    assert torch.equal(alive, (f > 0).any(dim=0))
    train_indices, val_indices = torch.arange(50, 300), torch.arange(50)
    summary = evaluate_sae(sae, acts, val_indices, train_indices, batch_size=16, device="cpu")
    assert summary["val_l0"] == pytest.approx((f[:50] > 0).float().mean().item(), rel=1e-6)
    assert summary["dead_features"] == int((f[50:] <= 0).all(dim=0).sum())
    print_eval_summary(summary)
    assert capsys.readouterr().out.startswith("\n---\nval_mse: ")
    save_eval_summary(summary, tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())["val_mse"] == summary["val_mse"]
    row = {"step": 0, "loss": 1.0, "mse": 0.5, "l1": 0.1, "l0": 0.2, "dead_features": 3, "lr": 0.0, "lam": 0.0}
    for _ in range(2):
        append_metrics_row(tmp_path / "metrics.csv", row)
    line = "0,1.0,0.5,0.1,0.2,3,0.0,0.0\n"
    assert (tmp_path / "metrics.csv").read_text() == "step,loss,mse,l1,l0,dead_features,lr,lam\n" + 2 * line


def test_data_calls(acts: Tensor, tiny_neox_dir: Path, tmp_path: Path):
    from mechint import SAETrainConfig, data
    from mechint.config import CollectConfig

    torch.save(acts, tmp_path / "acts.pt")
    for mmap in (True, False):
        assert torch.equal(data.load_activation_tensor(tmp_path / "acts.pt", mmap=mmap), acts)
    train, val = data.deterministic_split_indices(300, 0.1, 42)
    permutation = torch.randperm(300, generator=torch.Generator().manual_seed(42))
    assert torch.equal(val, permutation[:30]) and torch.equal(train, permutation[30:])
    loaded = data.load_activations_with_splits(tmp_path / "acts.pt", 0.1, 42)
    assert all(map(torch.equal, loaded, (acts, train, val)))
    batches = data.random_batch_iterator(acts, train, 16, 42)
    draws = torch.Generator().manual_seed(42)
    for _ in range(2):
        assert torch.equal(next(batches), acts[train[torch.randint(0, 270, (16,), generator=draws)]])
    assert torch.equal(torch.cat(list(data.split_batch_iterator(acts, val, 16))), acts[val])
    assert torch.equal(torch.cat(list(data.iter_activation_batches(acts, 128))), acts)

    assert data.detect_device("cpu") == "cpu" and data.detect_device() in ("cpu", "cuda", "mps")
    data.set_global_seed(5)
    first = torch.rand(3)
    data.set_global_seed(5)
    assert torch.equal(torch.rand(3), first)
    assert data.get_git_commit() and len(data.timestamp_slug()) == len("20260131-235959")

    run_dir = data.make_run_dir(str(tmp_path / "runs"), "a")
    assert Path(run_dir) == tmp_path / "runs" / "a" and data.make_run_dir(str(tmp_path / "runs"), "a").name == "a-1"
    (Path(run_dir) / "config.json").write_text("{}")
    data.write_run_manifest(run_dir, SAETrainConfig(), {"val_mse": 1.0})
    manifest = json.loads((tmp_path / "runs" / "a" / "manifest.json").read_text())
    assert manifest["config"]["activation_dim"] == 512 and manifest["summary"] == {"val_mse": 1.0}
    assert {"checkpoint_path", "git_commit"} <= manifest.keys()

    (tmp_path / "texts.txt").write_text(" the cat \n\nthe dog\n")
    texts = data.iter_texts_from_path(tmp_path / "texts.txt")
    assert list(texts) == ["the cat", "the dog"]
    collect = CollectConfig(
        model=str(tiny_neox_dir), dataset=str(tmp_path / "texts.txt"), output=tmp_path / "out.pt", device="cpu"
    )
    assert data.load_activation_tensor(data.collect_activations(collect, progress=False)).shape[1] == 32
