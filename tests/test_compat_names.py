"""Every name that code written for the first version imports, from where it imported it, called as it called it."""

import csv
import importlib
import importlib.util
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

from mechint.errors import MechintError
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
# Parameters, order and defaults of every one of them; what we take besides is keyword-only and has a default.
SIGNATURES = {
    "mechint.SAEloss": "xhat, x, f, lam=0.001",
    "mechint.SparseAutoEncoder": "d, m",
    "mechint.SparseAutoEncoder.encoder": "self, x",
    "mechint.SparseAutoEncoder.decoder": "self, f",
    "mechint.SparseAutoEncoder.renormalize_decoder": "self",
    "mechint.SAETrainConfig.to_dict": "self",
    "mechint.SAETrainConfig.save_json": "self, path",
    "mechint.SAETrainConfig.from_json": "path",
    "mechint.data.detect_device": "explicit=None",
    "mechint.data.set_global_seed": "seed",
    "mechint.data.load_activation_tensor": "path, mmap=True",
    "mechint.data.deterministic_split_indices": "n, val_fraction, seed",
    "mechint.data.load_activations_with_splits": "path, val_fraction, seed, mmap=True",
    "mechint.data.random_batch_iterator": "activations, batch_size, device, seed",
    "mechint.data.split_batch_iterator": "activations, indices, batch_size, device, seed",
    "mechint.data.iter_activation_batches": "activations, indices, batch_size, device",
    "mechint.data.timestamp_slug": "",
    "mechint.data.get_git_commit": "default='unknown'",
    "mechint.data.make_run_dir": "runs_root, run_name=None",
    "mechint.data.collect_activations": "config, output_path=None, checkpoint_every=5000",
    "mechint.data.write_run_manifest": "run_dir, manifest",
    "mechint.data.iter_texts_from_path": "path",
    "mechint.eval.collect_feature_activity": "model, activations, device, eval_batch_size=8192, indices=None",
    "mechint.eval.evaluate_sae": (
        "model, val_acts, feature_ever_active, num_features, device, eval_batch_size=8192, training_seconds=0.0,"
        " total_seconds=0.0, run_metadata=None, val_indices=None"
    ),
    "mechint.eval.print_eval_summary": "summary",
    "mechint.eval.save_eval_summary": "summary, output_path",
    "mechint.eval.append_metrics_row": "path, row",
    "mechint.analysis.collect_top_activations": "sae, activations, k=20, batch_size=4096, device='cpu'",
    "mechint.analysis.search_token": "feature_texts, query",
    "mechint.analysis.feature_consistency_score": "tokens",
    "mechint.analysis.decoder_cosine_similarity": "sae",
    "mechint.analysis.top_decoder_pairs": "sae, top_k=20",
    "mechint.ablation.build_transformer_model": "model_name",
    "mechint.ablation.load_sae_checkpoint": "checkpoint_path, activation_dim, expansion=None, device='cpu'",
    "mechint.ablation.single_feature_ablation_hook": "sae, feature_idx",
    "mechint.ablation.compute_text_kl": "model, text, hook_name, hook_fn",
    "mechint.ablation.rank_features_by_ablation": (
        "sae, model, hook_name, texts, feature_subset=None, show_progress=True"
    ),
    "mechint.ablation.save_ablation_rows": "rows, output_path",
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
def test_signatures_are_the_originals(path: str, expected: str):
    names = path.split(".")
    size = next(n for n in (2, 1) if importlib.util.find_spec(".".join(names[:n])) is not None)
    found: Any = importlib.import_module(".".join(names[:size]))
    for name in names[size:]:
        found = getattr(found, name)
    parameters = list(inspect.signature(found).parameters.values())
    ours = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert all(p.default is not p.empty for p in ours)
    said = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters if p not in ours]
    assert ", ".join(said) == expected
    assert all(p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) for p in parameters)


def test_every_function_has_its_signature_here():
    functions = {f"{module}.{name}" for module, names in NAMES.items() for name in names.split()}
    elsewhere = {"mechint.SAETrainConfig", "mechint.config.SAETrainConfig"}  # a dataclass of keywords
    elsewhere |= {"mechint.sae.SparseAutoEncoder", "mechint.sae.SAEloss"}  # those of mechint
    assert functions - elsewhere <= SIGNATURES.keys()


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
    return SparseAutoEncoder(32, 128)


@pytest.fixture(scope="module")
def acts() -> Tensor:
    return torch.randn(300, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model(tiny_neox_dir: Path) -> LanguageModel:
    return load_model(str(tiny_neox_dir), processing="centred", device="cpu")


def test_model_and_loss(sae: SparseAutoEncoder, acts: Tensor):
    from mechint import SAEloss
    from mechint import SparseAutoEncoder as FromTop

    assert FromTop is SparseAutoEncoder
    x_hat, f = sae(acts)
    torch.testing.assert_close(f, torch.relu((acts - sae.b_pre) @ sae.W_enc + sae.b_enc))
    torch.testing.assert_close(x_hat, f @ sae.W_dec + sae.b_pre)
    assert torch.equal(sae.encoder(acts), f) and torch.equal(sae.decoder(f), x_hat)
    loss = SAEloss(x_hat, acts, f, 3.0)
    torch.testing.assert_close(loss, (x_hat - acts).square().mean() + 3.0 * f.abs().mean())
    assert torch.equal(SAEloss(x_hat, acts, f), SAEloss(xhat=x_hat, x=acts, f=f, lam=1e-3))


def test_the_originals_training_loop(acts: Tensor):
    """Its own steps on its own class: the loss falls, and rows keep unit norm."""
    from mechint import SAEloss
    from mechint.data import random_batch_iterator

    torch.manual_seed(0)
    sae = SparseAutoEncoder(d=32, m=64)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    losses = []
    for _, x in zip(range(40), random_batch_iterator(acts, 64, "cpu", seed=42), strict=False):
        x_hat, f = sae(x)
        loss = SAEloss(x_hat, x, f, 0.01)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
        sae.renormalize_decoder()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


def test_config_calls(tmp_path: Path):
    from mechint import SAETrainConfig

    config = SAETrainConfig(activation_dim=32, expansion=4)
    assert config.num_features == 128
    changed = config.with_overrides(epochs=None, l1_lambda=2.0)
    assert (changed.l1_lambda, changed.epochs, config.l1_lambda) == (2.0, config.epochs, 3.0)
    path = changed.save_json(tmp_path / "new" / "config.json")
    assert path == tmp_path / "new" / "config.json" and SAETrainConfig.from_json(path) == changed
    assert path.read_text() == json.dumps(changed.to_dict(), indent=2, sort_keys=True) + "\n"
    path.write_text('{"activation_dim": 32, "l1_lamda": 2.0}')
    with pytest.raises(MechintError, match=r"config\.json: unknown key 'l1_lamda'; nearest: l1_lambda"):
        SAETrainConfig.from_json(str(path))
    with pytest.raises(MechintError, match="unknown key 'epoch'; nearest: epochs"):
        config.with_overrides(epoch=3)
    with pytest.raises(MechintError, match="config file not found"):
        SAETrainConfig.from_json(tmp_path / "none.json")


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
        latent_text_kl,
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
    x = torch.randn(3, 32)
    assert torch.equal(torch.cat(loaded(x), 1), torch.cat(sae(x), 1))

    hook = single_feature_ablation_hook(loaded, rows[0]["feature_idx"])
    found = compute_text_kl(model, "the cat sat", HOOK, hook)
    assert isinstance(found, dict) and len(found["kl"]) == len(found["tokens"])
    exact = latent_text_kl(loaded, model, HOOK, "the cat sat", rows[0]["feature_idx"])
    assert found.keys() < exact.keys() and found["max_kl_token_position"] == exact["max_kl_token_position"]
    assert found["kl"] == pytest.approx(exact["kl"], abs=2e-6, rel=1e-3)
    assert found["mean_kl"] == pytest.approx(sum(found["kl"]) / len(found["kl"]))
    names: list[str] = []
    unchanged = compute_text_kl(model, "the cat sat", HOOK, lambda value, hook: names.append(hook.name))
    assert names == [HOOK] and unchanged["max_kl"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(MechintError, match="'blocks.3.hook_resid_pots'.*nearest: blocks.3.hook_resid_post"):
        compute_text_kl(model, "the cat sat", "blocks.3.hook_resid_pots", hook)

    bridge = build_transformer_model(str(tiny_neox_dir), device="cpu")
    tokens = bridge.to_tokens("the cat sat")
    assert tokens[0].tolist() == found["token_ids"]  # BOS first, as it always was
    assert compute_text_kl(bridge, "the cat sat", HOOK, hook)["kl"] == pytest.approx(found["kl"], abs=2e-6, rel=1e-3)
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

    with torch.no_grad():
        f = sae.encode(acts)
    train_indices, val_indices = torch.arange(50, 300), torch.arange(50)
    assert torch.equal(collect_feature_activity(sae, acts, "cpu", 128), (f > 0).any(dim=0))
    alive = collect_feature_activity(sae, acts, "cpu", indices=train_indices)
    assert alive.dtype == torch.bool and torch.equal(alive, (f[50:] > 0).any(dim=0))
    whole = evaluate_sae(sae, acts[:50], alive, 128, "cpu")
    more = {"run_dir": "runs/a", "checkpoint_path": "runs/a/checkpoint.pt"}
    summary = evaluate_sae(sae, acts, alive, 128, "cpu", 16, 1.5, 2.5, more, val_indices)
    assert summary["val_l0"] == pytest.approx((f[:50] > 0).float().mean().item(), rel=1e-6)
    assert summary["val_mse"] == pytest.approx((sae.decode(f[:50]) - acts[:50]).square().mean().item(), rel=1e-5)
    assert summary["dead_features"] == int((f[50:] <= 0).all(dim=0).sum())
    assert summary["dead_fraction"] == summary["dead_features"] / 128
    assert (summary["training_seconds"], summary["total_seconds"]) == (1.5, 2.5)
    assert (summary["num_features"], summary["num_params"]) == (128, 32 + 128 + 2 * 32 * 128)
    assert summary.keys() - whole.keys() == more.keys() and whole["val_mse"] == pytest.approx(summary["val_mse"])
    with pytest.raises(MechintError, match="has 128 latents, but num_features is 4"):
        evaluate_sae(sae, acts, alive, 4, "cpu")
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
    for batches, pool in (
        (data.random_batch_iterator(acts, 16, "cpu", 42), torch.arange(300)),
        (data.split_batch_iterator(acts, train, 16, "cpu", 42), train),
    ):
        draws = torch.Generator().manual_seed(42)
        for _ in range(2):
            assert torch.equal(next(batches), acts[pool[torch.randint(0, len(pool), (16,), generator=draws)]])
    with pytest.raises(MechintError, match="batches of 16 from 0 rows"):
        data.split_batch_iterator(acts, val[:0], 16, "cpu", 42)
    in_order = list(data.iter_activation_batches(acts, val, 16, "cpu"))
    assert [len(batch) for batch in in_order] == [16, 14] and torch.equal(torch.cat(in_order), acts[val])
    assert torch.equal(torch.cat(list(data.iter_activation_batches(acts, None, 128, torch.device("cpu")))), acts)

    assert data.detect_device("cpu") == "cpu" and data.detect_device() in ("cpu", "cuda", "mps")
    data.set_global_seed(5)
    first = torch.rand(3)
    data.set_global_seed(5)
    assert torch.equal(torch.rand(3), first)
    assert data.get_git_commit() and data.get_git_commit(default="none") in (data.get_git_commit(), "none")
    assert len(data.timestamp_slug()) == len("20260131-235959")

    run_dir = data.make_run_dir(str(tmp_path / "runs"), "a")
    assert Path(run_dir) == tmp_path / "runs" / "a" and data.make_run_dir(str(tmp_path / "runs"), "a").name == "a-1"
    manifest = {"config": SAETrainConfig().to_dict(), "summary": {"val_mse": 1.0}}
    path = data.write_run_manifest(run_dir, manifest)
    assert path == tmp_path / "runs" / "a" / "manifest.json" and json.loads(path.read_text()) == manifest

    (tmp_path / "texts.txt").write_text(" the cat \n\nthe dog\n")
    texts = data.iter_texts_from_path(tmp_path / "texts.txt")
    assert list(texts) == ["the cat", "the dog"]
    ours = CollectConfig(
        model=str(tiny_neox_dir), dataset=str(tmp_path / "texts.txt"), output=tmp_path / "out.pt", device="cpu"
    )
    path, metadata_path = data.collect_activations(ours, progress=False)
    assert (path, metadata_path) == (tmp_path / "out.pt", tmp_path / "out.json")
    assert data.load_activation_tensor(path).shape[1] == 32
    store, record = data.collect_activations(ours, tmp_path / "store", 1, progress=False)
    assert (store, record) == (tmp_path / "store", tmp_path / "store" / "store.json")
    assert len(json.loads(record.read_text())["shards"]) == 2  # a text each


def test_collecting_with_the_originals_config(tiny_neox_dir: Path, tmp_path: Path):
    """As it collected: the residual without its mean, BOS prepended and kept."""
    from mechint import SAETrainConfig, data

    (tmp_path / "texts.txt").write_text("the cat sat\nthe dog\n")
    config = SAETrainConfig(
        activations_path=str(tmp_path / "acts.pt"), model_name=str(tiny_neox_dir), hook_name="blocks.2.hook_resid_post",
        dataset_name=str(tmp_path / "texts.txt"), device="cpu", max_chars=7,
    )  # fmt: skip
    path, metadata_path = data.collect_activations(config, checkpoint_every=0)
    assert (path, metadata_path) == (tmp_path / "acts.pt", tmp_path / "acts.json")
    sidecar = json.loads(metadata_path.read_text())
    assert (sidecar["activation_dim"], sidecar["config"]["hook_name"]) == (32, config.hook_name)
    assert (sidecar["config"]["layer"], sidecar["config"]["max_chars"]) == (2, 7)
    model = load_model(str(tiny_neox_dir), processing="centred", device="cpu")
    texts = [torch.tensor([tokens]) for tokens in model.tokenize(["the cat", "the dog"], prepend_bos=True)]
    with torch.inference_mode():
        expected = torch.cat([model.activations(tokens, config.hook_name)[0] for tokens in texts])
    torch.testing.assert_close(data.load_activation_tensor(path), expected, atol=1e-5, rtol=1e-5)
    elsewhere, _ = data.collect_activations(config, str(tmp_path / "b.pt"))
    assert elsewhere == tmp_path / "b.pt" and torch.equal(data.load_activation_tensor(elsewhere), torch.load(path))
