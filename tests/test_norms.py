"""Norm outliers and numbers that are not finite."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from collecting import collect_quietly, flags, one_thread, texts_fixture  # noqa: F401  (fixtures)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mechint.cli.collect import main
from mechint.data import open_activations
from mechint.data.norms import OUTLIER_MULTIPLE, add_histograms, norm_histograms, report_norms, summarise_norms


def changed_model(source: Path, folder: Path, token: str, value: float) -> Path:
    """A copy of the model with one entry of one token's embedding changed."""
    import shutil

    from transformers import AutoTokenizer

    shutil.copytree(source, folder)
    (token_id,) = AutoTokenizer.from_pretrained(source)(token).input_ids
    weights = load_file(folder / "model.safetensors")
    weights["gpt_neox.embed_in.weight"][token_id, 3] = value
    save_file({k: v.clone() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_never_enters_a_shard(tiny_neox_dir: Path, tmp_path: Path, value: float, capsys):
    model = changed_model(tiny_neox_dir, tmp_path / "model", "7", value)
    (tmp_path / "texts.txt").write_text("\n".join(["the cat sat"] * 21 + ["the cat 7 sat"] + ["the dog"] * 9) + "\n")
    assert main(flags(model, tmp_path / "texts.txt", tmp_path / "store")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    # attention multiplies even the positions that it masks, so the first bad row can come before the bad token
    assert "NaN or Inf at blocks.3.hook_resid_post in text 21, first at position 1" in error
    assert "--dtype float32" in error
    shards = sorted((tmp_path / "store").glob("shard-*"))
    assert len(shards) == 2  # texts 0 to 15
    assert all(bool(load_file(shard)["activations"].isfinite().all()) for shard in shards)


def test_outliers_are_reported_with_what_to_do(tiny_neox_dir: Path, texts_file: Path, tmp_path: Path, capsys):
    model = changed_model(tiny_neox_dir, tmp_path / "model", "<|endoftext|>", 3000.0)
    kept = collect_quietly(*flags(model, texts_file, tmp_path / "kept", "--keep-bos"))
    printed = capsys.readouterr().out
    norms = open_activations(kept).info["norms"]
    assert (norms["n_outliers"], norms["n_outliers_position_0"]) == (50, 50)
    assert norms["position_0"]["median"] == pytest.approx(3000, rel=0.01)
    assert "100% of them at position 0" in printed and "warning" in printed and "--no-keep-bos" in printed
    left_out = collect_quietly(*flags(model, texts_file, tmp_path / "out"))
    printed = capsys.readouterr().out
    norms = open_activations(left_out).info["norms"]
    assert norms["n_outliers"] == 0 and norms["position_0"]["n"] == 50 and not norms["position_0"]["kept"]
    assert "position 0 (left out): median 3.0" in printed and "warning" not in printed


@given(
    st.lists(st.floats(2.0**-7, 1e6, width=32), min_size=1, max_size=60),
    st.integers(0, 5),
    st.booleans(),
    st.integers(1, 4),
)
def test_norm_summary_is_close_to_exact(values: list[float], n_start: int, kept: bool, n_parts: int):
    values = [*values, *[values[0] * 50] * n_start]
    norms = torch.tensor(values)
    at_start = torch.arange(len(values)) >= len(values) - n_start
    parts = [norm_histograms(norms[i::n_parts], at_start[i::n_parts]) for i in range(n_parts)]
    parts = json.loads(json.dumps(parts))
    summary = summarise_norms(add_histograms(parts), kept)
    rest, start_norms = norms[~at_start].double().numpy(), norms[at_start].double().numpy()
    median = np.quantile(rest, 0.5, method="inverted_cdf")
    assert summary["median"] == pytest.approx(median, rel=0.006)
    assert summary["max"] == pytest.approx(rest.max())
    assert summary["position_0"]["n"] == n_start
    counted = np.concatenate([rest, start_norms]) if kept else rest
    low, high = (np.sum(counted > OUTLIER_MULTIPLE * median * factor) for factor in (1.02, 0.98))
    assert low <= summary["n_outliers"] <= high
    assert report_norms(summary, len(counted)).startswith("norms: median")


def test_outliers_elsewhere_get_another_hint():
    norms = torch.tensor([1.0] * 20 + [100.0] * 2)
    summary = summarise_norms(norm_histograms(norms, torch.zeros(22, dtype=torch.bool)), True)
    report = report_norms(summary, 22)
    assert summary["n_outliers"] == 2 and "0% of them at position 0" in report and "not first positions" in report
