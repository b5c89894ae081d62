"""Every metric against its closed form on tensors small enough to do by hand, and the files of every version."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechint.errors import MechintError
from mechint.eval import (
    ReconstructionSums,
    Text,
    append_metrics_row,
    collect_feature_activity,
    evaluate_rows,
    language_metrics,
    measure_activity,
    one_pass,
    predictions,
    print_eval_summary,
    read_metrics_csv,
    reconstruction,
    save_eval_summary,
    texts_from_tokens,
)
from mechint.sae import StandardSAE


def by_hand_sae() -> StandardSAE:
    """f = relu([x0, x1, -x0, x0 - 100]); x_hat = 0.5 * (f0, f1)."""
    sae = StandardSAE(2, 4)
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0, 0, -1, 1], [0, 1, 0, 0]]))
        sae.b_enc.copy_(torch.tensor([0.0, 0, 0, -100]))
        sae.W_dec.copy_(torch.tensor([[0.5, 0], [0, 0.5], [0, 0], [0, 0]]))
    return sae


def defined(metrics: dict[str, Any]) -> dict[str, Any]:
    """Without the None of undefined metrics, which pytest.approx cannot take."""
    return {key: value for key, value in metrics.items() if value is not None}


# --- reconstruction --------------------------------------------------------------------------------------------------


def test_each_metric_by_hand() -> None:
    # rows (4, 0), (0, 2), (-2, 0); f = (4,0,0,0), (0,2,0,0), (0,0,2,0); x_hat = (2,0), (0,1), (0,0)
    rows = torch.tensor([[4.0, 0], [0, 2], [-2, 0]])
    found = evaluate_rows(by_hand_sae(), rows, batch_size=2)
    squared_error = 4.0 + 1.0 + 4.0
    mean = (2 / 3, 2 / 3)
    scatter = (4 - mean[0]) ** 2 + mean[1] ** 2 + mean[0] ** 2 + (2 - mean[1]) ** 2 + (-2 - mean[0]) ** 2 + mean[1] ** 2
    expected = {
        "val_mse": squared_error / 6,
        "mse_per_dim": squared_error / 6,
        "mse_per_token": squared_error / 3,
        "val_l0": 3 / 12,
        "l0": 1.0,
        "l1": (4 + 2 + 2) / 3,
        "fvu": squared_error / scatter,
        "explained_variance": 1 - squared_error / scatter,
        # each row's squared distance from the mean: (10/3)^2 + (2/3)^2 = 104/9, 20/9 and 68/9
        "explained_variance_legacy": (1 - 4 * 9 / 104 + 1 - 1 * 9 / 20 + 1 - 4 * 9 / 68) / 3,
        "cosine": (1 + 1 + 0) / 3,
        "l2_ratio": (0.5 + 0.5 + 0) / 3,
        # |x_hat|^2 = 4, 1, 0 and <x, x_hat> = 8, 2, 0
        "relative_reconstruction_bias": 5 / 10,
        "n_val": 3,
        "n_train": 3,
        "n_dead_val": 1,
        "dead_features": 1,
        "dead_fraction": 0.25,
        "alive_features": 3,
        "dense_features": 3,  # on one row of three each
        "dense_fraction": 0.75,
        "features_over_1_percent": 3,
    }
    assert found == pytest.approx(expected, rel=1e-12)


def test_dead_features_are_those_of_the_training_rows() -> None:
    rows = torch.tensor([[4.0, 0], [0, 2], [-2, 0]])
    found = evaluate_rows(by_hand_sae(), rows, val_indices=torch.tensor([2]), train_indices=torch.tensor([0]))
    assert (found["dead_features"], found["n_dead_val"], found["n_val"], found["n_train"]) == (3, 3, 1, 1)
    assert found["dead_fraction"] == 0.75
    activity = collect_feature_activity(by_hand_sae(), rows, "cpu", indices=torch.tensor([0, 2]))
    assert activity.tolist() == [True, False, True, False]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 50), batch_size=st.integers(1, 60), seed=st.integers(0, 1000))
def test_the_batch_size_does_not_matter(n: int, batch_size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, 3, generator=generator) * 2 + 5
    sae = StandardSAE(3, 7, generator=generator)
    whole = evaluate_rows(sae, rows, batch_size=n)
    parts = evaluate_rows(sae, rows, batch_size=batch_size)
    assert defined(parts) == pytest.approx(defined(whole), rel=1e-5)
    x = rows.double()
    x_hat = sae.run(rows)[0].detach().double()
    assert whole["val_mse"] == pytest.approx(float((x - x_hat).square().mean()), rel=1e-5)
    if n > 1:
        fvu = float((x - x_hat).square().sum() / (x - x.mean(dim=0)).square().sum())
        assert parts["fvu"] == pytest.approx(fvu, rel=1e-5)


def test_fvu_survives_a_mean_far_larger_than_the_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(1000, 4, generator=generator).double()
    x = (1e6 + spread).float()  # float32 keeps the spread to about 1/16
    sums = ReconstructionSums(4, 1)
    for part in x.split(300):
        sums.add(part, torch.zeros_like(part), torch.zeros(len(part), 1))
    assert sums.scatter == pytest.approx(float((x.double() - x.double().mean(dim=0)).square().sum()), rel=1e-9)


def test_fvu_of_equal_rows_is_undefined_not_nan(capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluate_rows(by_hand_sae(), torch.ones(3, 2))
    assert found["fvu"] is None and found["explained_variance"] is None
    print_eval_summary(found)
    assert "fvu: undefined" in capsys.readouterr().out
    assert evaluate_rows(by_hand_sae(), torch.zeros(3, 2))["l2_ratio"] is None


def test_blocks_of_features_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 2)
    whole = evaluate_rows(by_hand_sae(), rows)
    monkeypatch.setattr(reconstruction, "MAX_BLOCK_ELEMENTS", 4 * 3)
    seen: list[int] = []
    plain = StandardSAE.encode
    monkeypatch.setattr(StandardSAE, "encode", lambda sae, x: seen.append(len(x)) or plain(sae, x))
    assert evaluate_rows(by_hand_sae(), rows, batch_size=1000) == pytest.approx(whole, rel=1e-6)
    assert max(seen) == 3


def test_mean_and_counts_of_the_training_pass() -> None:
    rows = torch.tensor([[4.0, 0], [0, 2], [-2, 0], [6, 1]])
    activity = measure_activity(by_hand_sae(), rows, torch.tensor([3, 0, 1]), batch_size=2)
    assert activity.fire_counts.tolist() == [2, 2, 0, 0]
    assert activity.mean.tolist() == pytest.approx([10 / 3, 1.0]) and activity.n_rows == 3


def test_unusable_activations_are_refused() -> None:
    sae = by_hand_sae()
    with pytest.raises(MechintError, match="3 wide.*expects 2"):
        evaluate_rows(sae, torch.ones(4, 3))
    with pytest.raises(MechintError, match="no held-out rows"):
        evaluate_rows(sae, torch.ones(4, 2), val_indices=torch.tensor([], dtype=torch.int64))
    rows = torch.ones(10, 2)
    rows[7, 1] = math.nan
    with pytest.raises(MechintError, match="row 7 "):
        evaluate_rows(sae, rows, torch.tensor([1]), torch.tensor([9, 7, 2, 3]), batch_size=2)


# --- in the language model -------------------------------------------------------------------------------------------


class OneStep:
    """A model whose hook holds an embedding of each token and whose logits are that value, unembedded by hand.

    Logits at a position depend on that position alone, so cross-entropies can be written down.
    """

    d_vocab = 3
    name = "by hand"
    embedding = torch.tensor([[2.0, 0], [0, 2], [-1, -1]])
    unembedding = torch.tensor([[1.0, 0, -1], [0, 1, -1]])  # each token predicts itself

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.logits_with(tokens, "hook", lambda value: value)

    def logits_with(self, tokens: torch.Tensor, hook_name: str, edit) -> torch.Tensor:  # noqa: ANN001
        assert hook_name == "hook"
        return edit(self.embedding[tokens]) @ self.unembedding


def expected_language(texts: list[Text], mean: torch.Tensor) -> dict[str, float]:
    """The same metrics, a position at a time, in float64."""
    model, sae = OneStep(), by_hand_sae()
    edits = {
        "clean": lambda x: x,
        "sae": lambda x: sae.run(x[None])[0][0].detach(),
        "zero": lambda x: x * 0,
        "mean": lambda x: mean,
    }
    nll = dict.fromkeys(edits, 0.0)
    kl, n = dict.fromkeys(edits, 0.0), 0
    for text in texts:
        for position in range(len(text.tokens) - 1):
            value = model.embedding[text.tokens[position]]
            log_probs = {}
            for name, edit in edits.items():
                used = edit(value) if text.seen[position] else value
                log_probs[name] = (used.double() @ model.unembedding.double()).log_softmax(0)
                nll[name] -= float(log_probs[name][text.tokens[position + 1]])
            for name in edits:
                kl[name] += float((log_probs["clean"].exp() * (log_probs["clean"] - log_probs[name])).sum())
            n += 1
    ce = {f"ce_{name}": total / n for name, total in nll.items()}
    for baseline in ("zero", "mean"):
        lost = ce[f"ce_{baseline}"] - ce["ce_clean"]
        ce[f"ce_recovered_{baseline}"] = (ce[f"ce_{baseline}"] - ce["ce_sae"]) / lost if lost > 0 else None
        ce[f"kl_score_{baseline}"] = (kl[baseline] - kl["sae"]) / kl[baseline]
    ce |= {f"kl_clean_{name}": kl[name] / n for name in edits if name != "clean"}
    return {**ce, "n_texts_ce": len(texts), "n_predicted": n}


@pytest.mark.parametrize("limit", [1, 2**26])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_language_metrics_by_hand(batch_size: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_pass, "MAX_LOGIT_ELEMENTS", limit)
    monkeypatch.setattr(predictions, "ROWS", 2)
    monkeypatch.setattr(predictions, "TILE", 2)  # of a vocabulary of three
    # Lengths differ, so that padding and a short last batch would show; one position 0 was not seen by the SAE.
    texts = [
        Text([0, 0, 0, 0, 0, 1, 1, 1, 1], [False] + [True] * 8),
        Text([1, 1], [True, True]),
        Text([2, 2, 2], [True] * 3),
        Text([0, 0], [False, True]),
    ]
    mean = torch.tensor([0.25, -0.5])
    found = language_metrics(by_hand_sae(), OneStep(), texts, mean, "hook", batch_size=batch_size)
    assert found == pytest.approx(expected_language(texts, mean), rel=1e-5, abs=1e-7)
    assert found["n_predicted"] == 8 + 1 + 2 + 1
    assert found["ce_recovered_zero"] is not None


def test_batches_hold_the_texts_and_the_logits_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, int]] = []
    plain = OneStep.logits
    monkeypatch.setattr(
        OneStep, "logits", lambda self, tokens: shapes.append(tuple(tokens.shape)) or plain(self, tokens)
    )
    texts = [Text([0] * length, [True] * length) for length in (7, 2, 2, 9, 4, 2, 3)]
    language_metrics(by_hand_sae(), OneStep(), texts, torch.zeros(2), "hook", batch_size=2)
    assert shapes == [(2, 2), (2, 3), (2, 7), (1, 9)]  # sorted by length
    shapes.clear()
    monkeypatch.setattr(one_pass, "MAX_LOGIT_ELEMENTS", 3 * 8)  # eight positions; a longer text goes alone
    language_metrics(by_hand_sae(), OneStep(), texts, torch.zeros(2), "hook", batch_size=100)
    assert shapes == [(3, 2), (2, 4), (1, 7), (1, 9)]


def test_a_perfect_and_a_useless_sae_recover_all_and_nothing() -> None:
    texts = [Text([1] * 6 + [2] * 4 + [0] * 4, [True] * 14)]
    perfect = StandardSAE(2, 4)
    with torch.no_grad():
        perfect.W_enc.copy_(torch.tensor([[1.0, -1, 0, 0], [0, 0, 1, -1]]))
        perfect.W_dec.copy_(perfect.W_enc.T)
    found = language_metrics(perfect, OneStep(), texts, torch.zeros(2), "hook")
    assert found["ce_recovered_zero"] == found["ce_recovered_mean"] == 1.0
    assert found["kl_clean_sae"] == 0.0 and found["ce_sae"] == found["ce_clean"]
    useless = StandardSAE(2, 4)
    with torch.no_grad():
        useless.W_dec.zero_()
    found = language_metrics(useless, OneStep(), texts, torch.tensor([1.0, 1.0]), "hook")
    assert found["ce_recovered_zero"] == 0.0 and found["ce_zero"] == pytest.approx(math.log(3))
    assert found["kl_clean_sae"] > 0.01
    # An ablation that costs nothing has nothing to recover.
    unharmed = language_metrics(perfect, OneStep(), [Text([0, 1], [False, True])], torch.zeros(2), "hook")
    assert unharmed["ce_recovered_zero"] is None and unharmed["ce_recovered_mean"] is None
    # Nor has one that helps: here every token is followed by one that the model thinks unlikely.
    helped = language_metrics(useless, OneStep(), [Text([0, 1, 0, 1], [True] * 4)], torch.zeros(2), "hook")
    assert helped["ce_zero"] < helped["ce_clean"] and helped["ce_recovered_zero"] is None


def test_texts_from_tokens_marks_the_bos_row() -> None:
    kept = texts_from_tokens([[0, 5, 6], [0]], prepend_bos=True, keep_bos=True)
    assert kept == [Text([0, 5, 6], [True] * 3)]
    left_out = texts_from_tokens([[0, 5]], prepend_bos=True, keep_bos=False)
    assert left_out == [Text([0, 5], [False, True])]
    assert texts_from_tokens([[5, 6]], prepend_bos=False, keep_bos=False) == [Text([5, 6], [True, True])]
    with pytest.raises(MechintError, match="two tokens"):
        texts_from_tokens([[0]], prepend_bos=True, keep_bos=True)


# --- printed and saved -----------------------------------------------------------------------------------------------


def test_the_printed_block_keeps_the_old_order(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"l0": 12.25, "checkpoint_path": "c.pt", "num_params": 10, "val_mse": 0.0123456789, "val_l0": 0.5}
    summary |= {"notes": ["hidden"], "extra": 1, "git_commit": "abc", "run_dir": "r", "dead_features": 0}
    print_eval_summary(summary)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["", "---"]
    assert lines[2:] == [
        "val_mse: 0.0123457",
        "val_l0: 0.5",
        "dead_features: 0",
        "num_params: 10",
        "git_commit: abc",
        "run_dir: r",
        "checkpoint_path: c.pt",
        "l0: 12.25",
        "extra: 1",
    ]


def test_saving_sorts_and_refuses_to_overwrite_when_told(tmp_path: Path) -> None:
    path = tmp_path / "new" / "eval.json"
    save_eval_summary({"b": 1, "a": None}, path)
    assert path.read_text() == '{\n  "a": null,\n  "b": 1\n}\n'
    with pytest.raises(MechintError, match="not overwritten"):
        save_eval_summary({"a": 2}, path, overwrite=False)
    assert json.loads(path.read_text()) == {"a": None, "b": 1}
    with pytest.raises(MechintError, match="folder"):
        save_eval_summary({}, tmp_path)


# --- metrics.csv -----------------------------------------------------------------------------------------------------

ROW = {"step": 0, "loss": 1.5, "mse": 0.1, "l1": 0.2, "l0": 0.25, "dead_features": 3, "lr": 3e-4, "lam": 0.1}


def test_rows_are_appended_under_one_header_and_read_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "metrics.csv"
    append_metrics_row(path, {**ROW, "fvu": 0.1 + 0.2})
    append_metrics_row(path, {**ROW, "step": 10})
    lines = path.read_text().splitlines()
    assert lines[0] == "step,loss,mse,l1,l0,dead_features,lr,lam,fvu" and len(lines) == 3
    assert read_metrics_csv(path) == [{**ROW, "fvu": 0.1 + 0.2}, {**ROW, "step": 10, "fvu": None}]


@pytest.mark.parametrize("torn", ["20,0.5,0.0", "20,0.5,0.25,1.0,0.5,3,0.1,0.", "x" * 9000])
def test_a_torn_last_line_is_left_out_and_replaced(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.csv"
    append_metrics_row(path, ROW)
    with open(path, "a") as file:
        file.write(torn)
    assert read_metrics_csv(path) == [ROW]
    append_metrics_row(path, {**ROW, "step": 20})
    assert read_metrics_csv(path) == [ROW, {**ROW, "step": 20}]


def test_a_file_torn_in_its_header_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("step,lo")
    append_metrics_row(path, ROW)
    assert read_metrics_csv(path) == [ROW]


def test_all_old_variants_are_read_under_the_same_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text("mse,l1,l0,loss\n0.5,0.1,0.25,0.8\n")
    (row,) = read_metrics_csv(path)
    assert row == {
        "step": None, "loss": 0.8, "mse": 0.5, "l1": 0.1, "l0": 0.25, "dead_features": None, "lr": None, "lam": None,
    }  # fmt: skip
    path.write_text("step,loss,mse,l1,l0,dead_features\n0,0.8,0.5,0.1,0.25,17\n1,0.7,0.4,0.1,0.2,16.0\n")
    rows = read_metrics_csv(path)
    assert [(row["step"], row["dead_features"], row["lam"]) for row in rows] == [(0, 17, None), (1, 16, None)]
    # Appending to one keeps its columns.
    append_metrics_row(path, {**ROW, "step": 2})
    assert path.read_text().splitlines()[-1] == "2,1.5,0.1,0.2,0.25,3"
    path.write_text("step,loss,mse,l1,l0,dead_features,lr,lam\n" + "0,1.5,0.1,0.2,0.25,3,0.0003,0.1\n")
    assert read_metrics_csv(path) == [ROW]


def test_files_that_are_no_metrics_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    with pytest.raises(MechintError, match="not found"):
        read_metrics_csv(path)
    path.write_text("feature_idx,mean_kl\n1,2\n")
    with pytest.raises(MechintError, match="not a metrics file"):
        read_metrics_csv(path)
    with pytest.raises(MechintError, match="not a metrics file"):
        append_metrics_row(path, ROW)
    path.write_text("mse,l1,l0,loss\n1,2,3\n4,5,6,7\n")
    with pytest.raises(MechintError, match="line 2: 3 values under 4 columns"):
        read_metrics_csv(path)
    path.write_text("mse,l1,l0,loss\n1,2,3,4\n1,x,3,4\n")
    with pytest.raises(MechintError, match="line 3: l1 is not a number: 'x'"):
        read_metrics_csv(path)
