"""Figures of a run, its activations, its dictionary and its effects. Each function returns a new matplotlib `Figure`.

Nothing is shown or written here: a notebook displays the object, `save_figure` writes it.
"""

import csv
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from mechint.analysis import top_decoder_pairs
from mechint.config import SAETrainConfig
from mechint.data.store import open_activations
from mechint.errors import MechintError
from mechint.eval import measure_activity, read_metrics_csv
from mechint.report import panels
from mechint.report.style import new_figure, note, save_figure
from mechint.runs import Run
from mechint.sae import SAE, load_sae

__all__ = [
    "activation_density_histogram",
    "activation_histogram",
    "comparison",
    "decoder_similarity",
    "kl_by_position",
    "overview",
    "ranking",
    "read_table",
    "save_figure",
    "training_curves",
]

# Tokens that the overview counts firings on: enough for densities down to 0.002 %, and seconds at most.
OVERVIEW_ROWS = 65_536
HEAT_MAP_LATENTS = 16


def training_curves(metrics_rows: Sequence[Mapping[str, Any]], *, d_sae: int | None = None) -> Figure:
    """Loss and its two terms, variance left unexplained, L0, and dead latents, by step.

    Args:
        metrics_rows: what `read_metrics_csv` returns, of any version of the file.
        d_sae: number of latents, for files that hold L0 as a fraction only.

    Raises:
        MechintError: there are no rows.
    """
    if not metrics_rows:
        raise MechintError("the metrics have no rows yet: the first one is written after step 0")
    fig = new_figure(9.0, 6.0)
    axes = fig.subplots(2, 2)
    panels.loss_panel(axes[0, 0], metrics_rows)
    panels.fvu_panel(axes[0, 1], metrics_rows)
    panels.l0_panel(axes[1, 0], metrics_rows, d_sae)
    panels.dead_panel(axes[1, 1], metrics_rows, d_sae)
    return fig


def activation_density_histogram(fire_counts: Int[Tensor, " d_sae"], n_rows: int) -> Figure:
    """How many latents fire on which share of `n_rows` tokens, on a log axis; dead ones are counted beside it.

    Args:
        fire_counts: rows on which each latent is above 0, as in `measure_activity(...).fire_counts`.
    """
    fig = new_figure(7.5, 4.2)
    panels.density_panel(fig.subplots(), fire_counts, n_rows)
    return fig


def activation_histogram(values: Float[Tensor, " n"], *, latent: int | None = None) -> Figure:
    """How strongly one latent fires: its values above 0 among `values`, one a token."""
    fig = new_figure(7.5, 3.6)
    panels.values_panel(fig.subplots(), values, latent)
    return fig


def decoder_similarity(sae: SAE, latents: Sequence[int] | None = None) -> Figure:
    """How alike the decoder directions are: the nearest other one of each latent, and the cosines among some.

    Args:
        latents: those of the heat map, in this order; if None, the ones in the most similar pairs.

    Raises:
        MechintError: a latent out of range.
    """
    if latents is None:
        latents = _most_alike(sae, HEAT_MAP_LATENTS) if sae.d_sae > 1 else [0]
    for latent in latents:
        if not 0 <= latent < sae.d_sae:
            raise MechintError(f"latent {latent} is not among the {sae.d_sae} of this SAE")
    fig = new_figure(11.0, 4.6)
    left, right = fig.subplots(1, 2, width_ratios=(1.15, 1))
    panels.nearest_cosine_panel(left, sae)
    panels.heat_panel(right, sae, list(latents))
    return fig


def _most_alike(sae: SAE, count: int) -> list[int]:
    """The latents of the most similar pairs, partners beside each other."""
    found: dict[int, None] = {}
    for i, j, _ in top_decoder_pairs(sae, top_k=4 * count):
        found |= {i: None, j: None}
    return list(found)[:count]


def ranking(rows: Sequence[Mapping[str, Any]], *, n_labels: int = 8, names: Mapping[int, str] | None = None) -> Figure:
    """Effect of removing each latent, largest first, on log axes; the first ones are listed.

    Args:
        rows: of an ablation CSV; `feature_idx` and `mean_kl` (nats) are read.
        names: what to write beside a listed latent's number, such as the token it fires on most.

    Raises:
        MechintError: there are no rows.
    """
    if not rows:
        raise MechintError("the ranking has no rows: scripts/batch_ablate.py writes one a latent")
    fig = new_figure(8.0, 5.0)
    panels.ranking_panel(fig.subplots(), rows, n_labels=n_labels, names=names)
    return fig


def kl_by_position(
    tokens: Sequence[str],
    kl: Float[Tensor, " pos"] | Sequence[float],
    *,
    latent: int | None = None,
    activation: Float[Tensor, " pos"] | Sequence[float] | None = None,
    next_log_prob: tuple[Float[Tensor, " pos"], Float[Tensor, " pos"]] | None = None,
) -> Figure:
    """KL(clean || latent removed) of the prediction made at each token of one text.

    Args:
        kl: nats, one a token.
        activation: what the latent is at each token; drawn above.
        next_log_prob: log-probability (nats) of the token that really comes next, before and after the removal; the
            last token, after which nothing comes, is NaN. Drawn below.

    Raises:
        MechintError: no tokens, or a series of another length.
    """
    series = {"kl": torch.as_tensor(kl)}
    if activation is not None:
        series["activation"] = torch.as_tensor(activation)
    if next_log_prob is not None:
        series |= {"log-probabilities before": next_log_prob[0], "log-probabilities after": next_log_prob[1]}
    for name, values in series.items():
        if len(values) != len(tokens) or not len(tokens):
            raise MechintError(f"{len(tokens)} tokens but {len(values)} values of {name}")
    heights = [1.0] * (activation is not None) + [1.6] + [1.3] * (next_log_prob is not None)
    fig = new_figure(min(max(7.0, 1.5 + 0.19 * len(tokens)), 16.0), 1.0 + 1.45 * sum(heights))
    axes = list(fig.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0])
    who = "the latent" if latent is None else f"latent {latent}"
    place = iter(axes)
    if "activation" in series:
        n_active = int((series["activation"] > 0).sum())
        title = f"{who[0].upper()}{who[1:]} fires on {n_active} of {len(tokens)} tokens"
        panels.position_bars(
            next(place), tokens, series["activation"], title=title, ylabel="activation", color=panels.ORANGE
        )
    worst = int(series["kl"].argmax())
    title = f"Without {who}: mean KL {float(series['kl'].mean()):.3g} nats, most at position {worst}"
    panels.position_bars(next(place), tokens, series["kl"], title=title, ylabel="KL, nats")
    if next_log_prob is not None:
        panels.before_after_panel(next(place), tokens, *next_log_prob)
    panels.token_ticks(axes[-1], tokens, always=worst)
    return fig


def comparison(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Best cosine of each left latent with a right one, mutual nearest neighbours apart.

    Args:
        rows: of a comparison CSV, of one pair of checkpoints; a file without `mutual_nearest` is taken as well.

    Raises:
        MechintError: there are no rows.
    """
    if not rows:
        raise MechintError("the comparison has no rows: scripts/compare_expansions.py writes one a latent")
    fig = new_figure(7.5, 4.2)
    panels.comparison_panel(fig.subplots(), rows)
    return fig


def read_table(path: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a CSV (ablation, comparison) as text by column. Raises `MechintError` if it cannot be read."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        raise MechintError(f"table not found: {os.fspath(path)}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise MechintError(f"table {os.fspath(path)} cannot be read: {error}") from error


# --- one page for a run ----------------------------------------------------------------------------------------------


def overview(run: Run) -> Figure:
    """One page for a finished run: how it trained, how often latents fire, how alike they are, and, where the files are
    there, their causal ranking (`ablation.csv` in the run) and the match with another SAE (`../comparisons/*.csv`).

    Raises:
        MechintError: the run is not finished.
    """
    sae = load_sae(run.checkpoint_path)
    rows = read_metrics_csv(run.metrics_path)
    fig = new_figure(14.0, 8.4)
    fig.suptitle(_headline(run, sae), fontsize=11, x=0.01, ha="left", parse_math=False)
    axes = fig.subplots(2, 3)
    panels.loss_panel(axes[0, 0], rows)
    panels.l0_panel(axes[0, 1], rows, sae.d_sae)
    _firing(axes[0, 2], run, sae)
    panels.nearest_cosine_panel(axes[1, 0], sae)
    table = run.path / "ablation.csv"
    if table.is_file() and (effects := read_table(table)):
        panels.ranking_panel(axes[1, 1], effects)
    else:
        panels.fvu_panel(axes[1, 1], rows)
    matches = _newest_comparison(run)
    if matches:
        panels.comparison_panel(axes[1, 2], matches)
    else:
        panels.dead_panel(axes[1, 2], rows, sae.d_sae)
    return fig


def _firing(ax: Any, run: Run, sae: SAE) -> None:
    try:
        activations = open_activations(run.activations_path())
    except MechintError as error:
        note(ax, "Activation density", str(error))
        return
    n_rows = min(OVERVIEW_ROWS, activations.n_rows)
    picked = torch.linspace(0, activations.n_rows - 1, n_rows, dtype=torch.float64).long()
    panels.density_panel(ax, measure_activity(sae, activations, picked).fire_counts, n_rows)


def _headline(run: Run, sae: SAE) -> str:
    config = run.config
    found = dict(run.summary) if run.is_done else {}
    if (run.path / "eval.json").is_file():
        found |= json.loads((run.path / "eval.json").read_text(encoding="utf-8"))
    shown = []
    for key, text in (
        ("l0", "L0 {:.1f}"),
        ("fvu", "FVU {:.3f}"),
        ("ce_recovered_mean", "cross-entropy recovered {:.3f} (baseline: mean)"),
        ("kl_clean_sae", "KL {:.3f} nats a token"),
    ):
        if isinstance(value := found.get(key), (int, float)) and math.isfinite(value):
            shown.append(text.format(value))
    if isinstance(dead := found.get("dead_features"), int):
        shown.append(f"{dead:,} dead")
    what = (
        f"{run.path.resolve().name}: {config.model_name or 'model not recorded'},"
        f" {config.hook_name or 'hook not recorded'}, {sae.d_sae:,} latents on {sae.d_in}"
        f" dimensions, {config.architecture}, {config.steps:,} steps, {_sparsity(config)}"
    )
    return what + ("\nHeld-out: " + ", ".join(shown) if shown else "")


def _sparsity(config: SAETrainConfig) -> str:
    """What decides how sparse the code is, in words."""
    for name, text in (("k", "k {:g}"), ("target_l0", "target L0 {:g}")):
        if (value := getattr(config, name)) is not None:
            return text.format(value)
    return f"penalty weight {config.l1_lambda:g}"


def _newest_comparison(run: Run) -> list[dict[str, str]]:
    """Rows of the newest comparison beside the run that has this run's checkpoint on one side (first such pair)."""
    name = run.path.resolve().name
    tables = sorted(run.path.resolve().parent.glob("comparisons/*.csv"), key=lambda path: -path.stat().st_mtime)
    for table in tables:
        try:
            rows = read_table(table)
        except MechintError as error:
            warnings.warn(str(error), stacklevel=2)
            continue
        if not rows or "cosine_similarity" not in rows[0]:
            continue  # of the tables beside it: sharing, the splitting tree
        sides = [(row.get("left_checkpoint") or "", row.get("right_checkpoint") or "") for row in rows]
        for pair in dict.fromkeys(sides):
            if name in {Path(side).parent.name for side in pair}:
                return [row for row, side in zip(rows, sides, strict=True) if side == pair]
    return []
