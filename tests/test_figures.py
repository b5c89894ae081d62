"""Figures show the numbers they are given: read back from what was drawn, not from the drawing code."""

import csv
import math
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import make_small_run

from mechint.errors import MechintError
from mechint.report import figures, panels, tables
from mechint.sae import StandardSAE


def metrics(n: int = 11) -> list[dict]:
    rows = []
    for i in range(n):
        mse, l0, lam = 0.9 * 0.6**i + 0.03, 20 + 400 * 0.5**i, min(1.0, i / 3)
        rows.append(
            {
                "step": 100 * i, "loss": mse + lam * 0.02, "mse": mse, "l1": 0.02, "l0": l0 / 1024, "dead_features": i,
                "lr": 1e-3, "lam": lam, "l0_count": l0, "fvu": mse / 0.9,
            }
        )  # fmt: skip
    return rows


def line(ax, label: str):
    return next(found for found in ax.lines if found.get_label() == label)


def heights(ax) -> list[float]:
    return [patch.get_height() for patch in ax.patches]


def test_training_curves_are_the_rows():
    rows = metrics()
    fig = figures.training_curves(rows)
    loss, fvu, l0, dead = fig.axes
    assert line(loss, "loss").get_ydata().tolist() == [row["loss"] for row in rows]
    assert line(loss, "loss").get_xdata().tolist() == [row["step"] for row in rows]
    penalty = line(loss, "all other terms (penalty)").get_ydata()
    assert math.isnan(penalty[0]) and penalty[-1] == pytest.approx(0.02)
    assert line(l0, "L0").get_ydata().tolist() == [row["l0_count"] for row in rows]
    assert line(dead, "dead").get_ydata()[-1] == 10
    assert [ax.get_yscale() for ax in fig.axes] == ["log", "log", "log", "linear"]
    assert "420" in l0.get_title(loc="left") and "10" in dead.get_title(loc="left")
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in fig.axes)


def test_training_curves_of_the_oldest_metrics_file():
    keep = {"loss", "mse", "l1", "l0"}
    rows = [{key: value if key in keep else None for key, value in row.items() if key in keep | {"step", "lam"}}
            for row in metrics()]  # fmt: skip
    loss, fvu, l0, dead = figures.training_curves(rows, d_sae=1024).axes
    assert line(loss, "loss").get_xdata().tolist() == list(range(11))
    assert line(l0, "L0").get_ydata()[0] == pytest.approx(420)
    assert not fvu.lines and "no column fvu" in fvu.texts[0].get_text()
    assert not dead.lines
    with pytest.raises(MechintError, match="no rows"):
        figures.training_curves([])


def test_density_counts_every_living_latent_once():
    counts = torch.tensor([0, 0, 0, 1, 10, 100, 1000, 1000, 400])
    (ax,) = figures.activation_density_histogram(counts, 1000).axes
    assert sum(heights(ax)) == 6
    assert ax.get_xscale() == "log"
    edges = [ax.patches[0].get_x(), ax.patches[-1].get_x() + ax.patches[-1].get_width()]
    assert edges == pytest.approx([1e-3, 1.0])
    legend = " ".join(text.get_text() for text in ax.get_legend().get_texts())
    assert "dead: 3" in legend and "10 % of tokens: 3" in legend
    (empty,) = figures.activation_density_histogram(torch.zeros(4, dtype=torch.int64), 1000).axes
    assert "none of 4" in empty.texts[0].get_text()
    (always,) = figures.activation_density_histogram(torch.tensor([5]), 5).axes
    assert sum(heights(always)) == 1


def test_activation_histogram_leaves_zeros_out():
    values = torch.cat([torch.zeros(90), torch.arange(1, 11).float()])
    (ax,) = figures.activation_histogram(values, latent=7).axes
    assert sum(heights(ax)) == 10
    assert ax.get_title(loc="left") == "Latent 7 fires on 10 % of 100 tokens, up to 10"
    (ax,) = figures.activation_histogram(torch.zeros(5)).axes
    assert "does not fire" in ax.texts[0].get_text()


def planted_sae() -> StandardSAE:
    torch.manual_seed(0)
    sae = StandardSAE(16, 40)
    with torch.no_grad():
        sae.W_dec[30] = sae.W_dec[3]
        sae.W_dec[31] = -sae.W_dec[4]
    return sae


def test_nearest_cosines_are_those_of_the_whole_matrix(monkeypatch: pytest.MonkeyPatch):
    sae = planted_sae()
    unit = torch.nn.functional.normalize(sae.W_dec.detach().double(), dim=1)
    expected = (unit @ unit.T).abs().fill_diagonal_(0).amax(dim=1).float()
    assert torch.allclose(panels.nearest_cosines(sae), expected, atol=1e-6)
    blocks = panels.decoder_similarity_blocks
    monkeypatch.setattr(panels, "decoder_similarity_blocks", lambda sae: blocks(sae, block_size=7))
    assert torch.allclose(panels.nearest_cosines(sae), expected, atol=1e-6)
    assert (expected > 0.999).sum() == 4


def test_random_directions_are_as_close_as_the_formula_says():
    # P(|cos| < c) of two random directions in 3 dimensions is c (Archimedes), so the median of the nearest of n is
    # about 0.5 ** (1 / n).
    found = panels.random_nearest_cosine(3, 101, n_probes=2000)
    assert found == pytest.approx(0.5 ** (1 / 100), abs=0.002)


def test_decoder_similarity_shows_the_planted_pairs():
    sae = planted_sae()
    left, right, _ = figures.decoder_similarity(sae).axes
    assert sum(heights(left)[:50]) == 40
    assert "cosine 1.00" in right.get_title(loc="left") and "3 and 30" in right.get_title(loc="left")
    shown = np.ma.getdata(figures.decoder_similarity(sae, [4, 31, 5]).axes[1].images[0].get_array())
    assert shown[0, 1] == pytest.approx(-1.0) and abs(shown[0, 2]) < 0.9
    with pytest.raises(MechintError, match="latent 40 is not among the 40"):
        figures.decoder_similarity(sae, [1, 40])
    figures.decoder_similarity(StandardSAE(4, 1))


def test_ranking_sorts_what_a_csv_holds():
    rows = [{"feature_idx": str(i), "mean_kl": str(kl)} for i, kl in enumerate([0.0, 0.5, 1e-3, 0.0, 2.0, 1e-12])]
    (ax,) = figures.ranking(rows, names={4: " $x$"}).axes
    assert ax.lines[0].get_ydata().tolist() == [2.0, 0.5, 1e-3, 1e-12]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    box = ax.texts[0].get_text()
    assert box.splitlines()[1].split() == ["1.", "4", "2", "\u00b7$x$"] and "1 below this axis" in box
    assert "2 have none" in ax.get_title(loc="left")
    (ax,) = figures.ranking([{"feature_idx": 0, "mean_kl": 0.0}]).axes
    assert "none of 1" in ax.texts[0].get_text()
    with pytest.raises(MechintError, match="batch_ablate"):
        figures.ranking([])


def test_kl_by_position_draws_each_token(tmp_path: Path):
    tokens = ["<|endoftext|>", "On", " $5$", "\n", " \u4e2d", "."]
    kl = [0.0, 0.1, 0.3, 0.0, 0.2, 0.0]
    before = torch.tensor([-1.0, -2.0, -3.0, -1.0, -1.0, math.nan])
    after = before - torch.tensor([0.0, 1.0, 0.5, 0.0, 0.01, 0.0])
    fig = figures.kl_by_position(tokens, kl, latent=9, activation=torch.ones(6), next_log_prob=(before, after))
    acts, effect, change = fig.axes
    assert heights(acts) == [1.0] * 6
    assert heights(effect) == pytest.approx(kl)
    assert "position 2" in effect.get_title(loc="left")
    assert line(change, "after").get_xdata().tolist() == [1, 2]
    labels = [text.get_text() for text in change.get_xticklabels()]
    assert labels == ["<|endoftext|>", "On", "\u00b7$5$", "\u21b5", "\u00b7\ufffd", "."]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that the font lacks, "$" read as mathematics
        figures.save_figure(fig, tmp_path / "kl.png")
    long = figures.kl_by_position(["a"] * 1000, torch.rand(1000)).axes[0]
    assert len(long.get_xticks()) <= 141 and long.figure.get_figwidth() <= 16
    for wrong in ([0.1], []):
        with pytest.raises(MechintError, match="6 tokens but"):
            figures.kl_by_position(tokens, wrong)
    with pytest.raises(MechintError):
        figures.kl_by_position([], [])


def test_comparison_tells_mutual_from_one_sided():
    rows = [{"cosine_similarity": "0.9", "mutual_nearest": "true"}] * 3 + [
        {"cosine_similarity": "0.2", "mutual_nearest": "false"}
    ]
    (ax,) = figures.comparison(rows).axes
    assert sum(heights(ax)) == 4
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["each other's nearest: 3", "one-sided: 1"]
    assert "75 % mutual nearest, median cosine 0.90" in ax.get_title(loc="left")
    old = [{"cosine_similarity": "0.5"}, {"cosine_similarity": "-0.15"}]
    (ax,) = figures.comparison(old).axes
    assert sum(heights(ax)) == 2 and "mutual" not in ax.get_title(loc="left")


def test_figures_are_saved_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fig = figures.training_curves(metrics())
    path = tmp_path / "new" / "curves.png"
    figures.save_figure(fig, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 10_000
    width, height = (int.from_bytes(first[i : i + 4]) for i in (16, 20))
    assert (width, height) == (1350, 900)
    figures.save_figure(figures.training_curves(metrics()), path)
    assert path.read_bytes() == first
    with pytest.raises(MechintError, match=r"\.png"):
        figures.save_figure(fig, tmp_path / "curves.jpg")

    def half(file, **_):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fig, "savefig", half)
    with pytest.raises(MechintError, match="no room"):
        figures.save_figure(fig, path)
    assert path.read_bytes() == first and [p.name for p in path.parent.iterdir()] == ["curves.png"]


def test_figures_leave_pyplot_alone():
    code = "import sys, mechint.report.figures; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- tables ----------------------------------------------------------------------------------------------------------


def test_next_log_probs_and_changes_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]]))
    found = tables.next_log_probs(logits, torch.tensor([0, 1, 2]))
    assert found[:2].exp().tolist() == pytest.approx([0.25, 0.8]) and math.isnan(found[2])
    changes = tables.prediction_changes(logits[0], logits[1] + 3.0, top_k=1)
    assert [change.token for change in changes] == [0, 2]
    assert [change.before for change in changes] == pytest.approx([0.5, 0.25])
    assert [change.after for change in changes] == pytest.approx([0.1, 0.8])


def test_tables_escape_what_a_text_holds():
    bad = "<script>alert(1)</script>"
    assert "<script" not in tables.table_html([{bad: bad}])
    assert tables.table_html([{bad: bad}]).count("&lt;script&gt;") == 2
    page = tables.predictions_html([tables.PredictionChange(0, 0.5, 0.1)], lambda ids: bad)
    assert "<script" not in page and "50.0 %" in page and "10.0 %" in page


# --- a run on one page -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_overview_and_contexts_of_a_real_run(tmp_path: Path):
    from mechint.analysis import collect_top_activations
    from mechint.data import open_activations
    from mechint.models import load_model
    from mechint.sae import load_sae

    run = make_small_run(tmp_path)
    titles = [ax.get_title(loc="left") for ax in figures.overview(run).axes]
    assert len(titles) == 6 and titles[0].startswith("Loss goes from") and "never fired" in titles[5]

    write_csv(run.path / "ablation.csv", [{"feature_idx": i, "mean_kl": 0.1 / (i + 1)} for i in range(512)])
    row = {"left_checkpoint": "x/other/checkpoint.pt", "right_checkpoint": "runs/small/checkpoint.pt"}
    row |= {"cosine_similarity": 0.7, "mutual_nearest": "true"}
    write_csv(tmp_path / "runs" / "comparisons" / "a.csv", [row] * 256)
    write_csv(tmp_path / "runs" / "comparisons" / "b.csv", [{**row, "right_checkpoint": "runs/y/checkpoint.pt"}])
    (run.path / "eval.json").write_text('{"ce_recovered_mean": 0.987, "l0": 33.3}')
    fig = figures.overview(run)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert titles[4].startswith("Top 10:") and "100 % mutual nearest, median cosine 0.70" in titles[5]
    assert sum(heights(fig.axes[5])) == 256
    headline = fig.get_suptitle()
    assert "512 latents" in headline and "recovered 0.987" in headline and "L0 33.3" in headline
    figures.save_figure(fig, run.path / "overview.png")

    sae, activations = load_sae(run.checkpoint_path), open_activations(run.activations_path())
    values, rows = collect_top_activations(sae, activations, k=3)
    latent = int(values[:, 2].argmax())
    decode = load_model("builtin/pythia-tiny").tokenizer.decode
    page = tables.contexts_html(sae, activations, latent, rows[latent], decode)
    assert page.count("<tr>") == 4 and page.count("font-weight:bold") == 3
    assert f"{float(values[latent, 0]):.2f}" in page
    with pytest.raises(MechintError, match="latent 512"):
        tables.contexts_html(sae, activations, 512, rows[0], decode)

    activations.path.rename(tmp_path / "moved")
    moved = figures.overview(run).axes[2]
    assert not moved.patches and "activations" in moved.texts[0].get_text()


def write_csv(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
