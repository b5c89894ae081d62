"""Rows whose norm is far above that of the others: left out of training, and told apart in evaluation."""

from pathlib import Path

import pytest
import torch
from collecting import one_thread  # noqa: F401  (a fixture)
from test_norms import changed_model

from mechint.cli.train import main
from mechint.config import CollectConfig, EvalConfig, SAETrainConfig
from mechint.data import open_activations
from mechint.data.batches import split_as, split_indices
from mechint.data.collect import collect
from mechint.eval import evaluate_checkpoint, texts_from_rows
from mechint.eval.reconstruction import measure_rows
from mechint.models import load_model
from mechint.provenance import read_json
from mechint.sae import load_sae
from mechint.train.resolve import without_unsaid

MULTIPLE = 4.0


@pytest.fixture(scope="module")
def store(tiny_neox_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Activations of a model that makes long vectors of one token."""
    root = tmp_path_factory.mktemp("outliers")
    model = changed_model(tiny_neox_dir, root / "model", "7", 100.0)
    lines = ["the cat sat on the mat", "the dog ran to the red house", "the 7 cats", "a bird sang in the tree"]
    (root / "texts.txt").write_text("\n".join(lines * 40) + "\n")
    config = CollectConfig(
        model=str(model), dataset=str(root / "texts.txt"), output=root / "acts", hook="blocks.0.hook_resid_pre"
    )
    return collect(config, progress=False).path


def settings(store: Path, runs: Path, **changes: object) -> SAETrainConfig:
    values = {
        "activations_path": str(store),
        "activation_dim": open_activations(store).d_in,
        "expansion": 2,
        "epochs": 30,
        "batch_size": 64,
        "val_fraction": 0.25,
        "runs_root": str(runs),
        "run_name": "run",
        "device": "cpu",
    }
    return SAETrainConfig.from_dict({**values, **changes})


def asked(store: Path, runs: Path, steps: int, multiple: float) -> list[str]:
    words = f"--expansion 2 --steps {steps} --batch-size 64 --val-fraction 0.25".split()
    words += ["--preset", "mechint", "--lam", "0.2", "--run-name", "run", "--device", "cpu"]
    return [*words, "--activations-path", str(store), "--runs-root", str(runs), "--max-norm-multiple", f"{multiple}"]


def far_rows(store: Path) -> torch.Tensor:
    """Whether each row is above the limit, from the definition."""
    norms = open_activations(store).tensor().double().pow(2).sum(dim=1).sqrt()
    return norms > MULTIPLE * norms.sort().values[(len(norms) - 1) // 2]


def test_training_leaves_out_the_rows_above_the_limit(store: Path, tmp_path: Path):
    activations, far = open_activations(store), far_rows(store)
    assert activations.tokens is not None and 10 < int(far.sum()) < 0.1 * len(far)
    config = settings(store, tmp_path, max_norm_multiple=MULTIPLE)
    train, val = split_as(config, activations)
    every, held_out = split_indices(activations, 0.25, config.seed)
    assert torch.equal(val, held_out) and bool(far[val].any()), "held-out rows stay as they are"
    assert torch.equal(train, every[~far[every]]) and len(train) < len(every)
    assert torch.equal(split_as(settings(store, tmp_path), activations)[0], every), "off unless asked for"


def test_what_was_left_out_is_said(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    activations, far = open_activations(store), far_rows(store)
    assert main(asked(store, tmp_path, 200, MULTIPLE)) == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    every, held_out = split_indices(activations, 0.25, 42)
    assert activations.tokens is not None
    (token,) = activations.tokens[far].unique().tolist()
    n_far = int(far[every].sum())
    assert summary["left_out"]["n_rows"] == n_far and summary["left_out"]["tokens"] == {str(token): n_far}
    assert summary["n_train"] == len(every) - n_far and summary["n_val"] == len(held_out)
    said = capsys.readouterr().err
    assert f"{n_far} rows above 4 times the median norm" in said and f"{token} ({n_far})" in said

    # the metrics without them are those of the other rows, about their own mean
    sae = load_sae(tmp_path / "run")
    kept = held_out[~far[held_out]]
    expected = measure_rows(sae, activations, kept).metrics()
    found = evaluate_checkpoint(EvalConfig(run_dir=tmp_path / "run", max_eval_texts=0, device="cpu"))
    for typical in (summary["without_outliers"], found["without_outliers"]):
        assert typical["n_outliers"] == len(held_out) - len(kept)
        assert typical["fvu"] == pytest.approx(expected["fvu"], rel=1e-6)
    x = activations.rows(kept).double()
    x_hat = sae(x.float()).detach().double()
    by_hand = (x - x_hat).pow(2).sum() / (x - x.mean(dim=0)).pow(2).sum()
    assert found["without_outliers"]["fvu"] == pytest.approx(float(by_hand), rel=1e-4)
    assert found["fvu"] != pytest.approx(found["without_outliers"]["fvu"], rel=0.05)
    assert any("without_outliers" in note for note in found["notes"])
    assert found["n_train"] == len(every) - n_far, "dead latents are counted on what was trained on"


def test_without_such_rows_nothing_is_said(store: Path, tmp_path: Path):
    assert main(asked(store, tmp_path, 10, 1000)) == 0
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["left_out"]["n_rows"] == 0 and "without_outliers" not in summary


def test_the_preset_leaves_them_out_and_older_runs_did_not(store: Path, tmp_path: Path):
    assert settings(store, tmp_path, preset="mechint").max_norm_multiple == 10.0
    assert settings(store, tmp_path, preset="mechint", max_norm_multiple=0).max_norm_multiple == 0
    assert settings(store, tmp_path, preset="mech-int").max_norm_multiple == 0
    recorded = without_unsaid(settings(store, tmp_path, preset="mechint")).to_dict()
    del recorded["max_norm_multiple"]
    assert SAETrainConfig.from_dict(recorded).max_norm_multiple == 0


def test_cross_entropy_with_outliers_left_as_they_are(store: Path, tmp_path: Path):
    """Against an edit written out here, one text at a time through the whole model."""
    assert main(asked(store, tmp_path, 100, MULTIPLE)) == 0
    found = evaluate_checkpoint(EvalConfig(run_dir=tmp_path / "run", max_eval_texts=30, device="cpu"))
    typical = found["without_outliers"]
    activations, sae = open_activations(store), load_sae(tmp_path / "run")
    model = load_model(activations.info["model_source"])
    _, held_out = split_indices(activations, 0.25, 42)
    losses: dict[float, list[torch.Tensor]] = {typical["norm_limit"]: [], float("inf"): []}
    for text in texts_from_rows(activations, held_out, max_texts=30):
        tokens = torch.tensor([text.tokens])
        for limit, of_limit in losses.items():

            def edit(value: torch.Tensor, limit: float = limit) -> torch.Tensor:
                kept = value.norm(dim=-1) > limit
                kept |= ~torch.tensor([text.seen])  # noqa: B023  (used before the next text)
                return torch.where(kept[..., None], value, sae(value))

            logits = model.logits_with(tokens, "blocks.0.hook_resid_pre", edit)
            of_limit.append(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none"))
    spared, flat = (float(torch.cat(of_limit).mean()) for of_limit in losses.values())
    assert typical["ce_sae"] == pytest.approx(spared, rel=3e-6) and found["ce_sae"] == pytest.approx(flat, rel=3e-6)
    assert spared != pytest.approx(flat, rel=1e-5)
    for baseline in ("ce_clean", "ce_zero", "ce_mean"):
        assert typical[baseline] == found[baseline]
