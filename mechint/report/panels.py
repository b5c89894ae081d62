"""One view each, drawn on the axes that are handed in; `figures.py` puts them on pages.

Titles state what is seen, with its number; axes carry the unit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from mechint.analysis import decoder_similarity_blocks
from mechint.report.style import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    ORANGE,
    RED,
    SKY,
    dress,
    legend,
    note,
    plain_log_ticks,
    share,
    token_labels,
)
from mechint.sae import SAE

MetricsRows = Sequence[Mapping[str, Any]]
# Log-probabilities (nats) that move by less are drawn as unmoved: less than a tenth of the probability.
VISIBLE_CHANGE = 0.1
# Effects below this share of the largest one are not drawn: they would stretch the axis over many empty decades.
SMALLEST_EFFECT = 1e-6


# --- training --------------------------------------------------------------------------------------------------------


def column(rows: MetricsRows, name: str) -> Float[np.ndarray, " rows"]:
    """A column of the metrics; NaN where a row has no value, so that the line has a gap there."""
    return np.array([math.nan if row.get(name) is None else float(row[name]) for row in rows], dtype=np.float64)


def steps(rows: MetricsRows) -> Float[np.ndarray, " rows"]:
    """The steps; the oldest files have none, and then rows are counted."""
    found = column(rows, "step")
    return np.arange(len(rows), dtype=np.float64) if np.isnan(found).all() else found


def _line(ax: Axes, rows: MetricsRows, y: np.ndarray, color: str, label: str, style: str = "-") -> None:
    marker = "o" if len(rows) <= 60 else ""
    ax.plot(steps(rows), y, style, color=color, label=label, linewidth=1.6, marker=marker, markersize=3.5)


def _log_y(ax: Axes, *series: np.ndarray) -> None:
    """A log axis, if there is anything above 0 to show on it; values of 0 become gaps."""
    values = np.concatenate(series)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values):
        ax.set_yscale("log", nonpositive="mask")
        plain_log_ticks(ax.yaxis, float(values.min()), float(values.max()))


def _first_last(y: np.ndarray) -> tuple[float, float]:
    finite = y[np.isfinite(y)]
    return (float(finite[0]), float(finite[-1])) if len(finite) else (math.nan, math.nan)


def _step_label(rows: MetricsRows) -> str:
    return "optimiser step" if any(row.get("step") is not None for row in rows) else "row of the metrics file"


def loss_panel(ax: Axes, rows: MetricsRows) -> None:
    """Loss, and what it is the sum of: the squared error and all other terms with their weights."""
    loss, mse = column(rows, "loss"), column(rows, "mse")
    # a difference below the rounding of float32 is none
    penalty = np.where(loss - mse > 1e-6 * loss, loss - mse, 0.0)
    _line(ax, rows, loss, BLUE, "loss")
    _line(ax, rows, mse, ORANGE, "squared error per dimension", "--")
    if np.nanmax(penalty, initial=0.0) > 0:
        _line(ax, rows, np.where(penalty > 0, penalty, math.nan), GREEN, "all other terms (penalty)", ":")
    first, last = _first_last(loss)
    dress(ax, f"Loss goes from {first:.3g} to {last:.3g}", _step_label(rows), "loss per dimension (log)")
    _log_y(ax, loss, mse, penalty)
    legend(ax)


def fvu_panel(ax: Axes, rows: MetricsRows) -> None:
    """Fraction of variance unexplained, of the batch."""
    fvu = column(rows, "fvu")
    if np.isnan(fvu).all():
        note(ax, "Variance left unexplained", "this metrics file has no column fvu")
        return
    _line(ax, rows, fvu, BLUE, "fvu")
    dress(
        ax,
        f"{share(_first_last(fvu)[1], 1.0)} of the variance is left unexplained",
        _step_label(rows),
        "FVU of the batch (log)",
    )
    _log_y(ax, fvu)


def l0_panel(ax: Axes, rows: MetricsRows, d_sae: int | None = None) -> None:
    """Active latents a token; as a share of all latents if the file does not tell how many there are."""
    count = column(rows, "l0_count")
    unit = "active latents a token (log)"
    if np.isnan(count).all():
        count = column(rows, "l0") * (d_sae or 1)
        unit = unit if d_sae else "share of latents active (log)"
    _line(ax, rows, count, BLUE, "L0")
    first, last = _first_last(count)
    dress(ax, f"L0 goes from {first:.3g} to {last:.3g}", _step_label(rows), unit)
    _log_y(ax, count)


def dead_panel(ax: Axes, rows: MetricsRows, d_sae: int | None = None) -> None:
    """Latents that were active in no training batch so far."""
    dead = column(rows, "dead_features")
    if np.isnan(dead).all():
        note(ax, "Dead latents", "this metrics file has no column dead_features")
        return
    _line(ax, rows, dead, RED, "dead")
    for line in ax.lines:
        line.set_clip_on(False)  # markers at 0 would be cut in half
    of_all = f" of {d_sae:,}" if d_sae else ""
    title = f"{_first_last(dead)[1]:,.0f}{of_all} latents have never fired"
    dress(ax, title, _step_label(rows), "latents without a firing so far")
    ax.set_ylim(bottom=0, top=max(float(np.nanmax(dead)) * 1.08, 4.0))
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))


# --- activations -----------------------------------------------------------------------------------------------------


def density_panel(ax: Axes, fire_counts: Int[Tensor, " d_sae"], n_rows: int) -> None:
    """How many latents fire how often, on a log axis from once in `n_rows` to always."""
    density = fire_counts.double().cpu().numpy() / max(n_rows, 1)
    alive = density[density > 0]
    n_dead = len(density) - len(alive)
    if not len(alive):
        note(ax, "Activation density", f"none of {len(density):,} latents fires on these {n_rows:,} tokens")
        return
    # From a decade mark to 1, eight bins a decade, so that edges lie on the ticks.
    first = math.floor(math.log10(alive.min()))
    ax.hist(alive, bins=list(np.logspace(first, 0, 8 * -first + 1 if first < 0 else 2)), color=BLUE, edgecolor="white")
    ax.set_xscale("log")
    median = float(np.median(alive))
    ax.axvline(median, color=ORANGE, linewidth=1.8, label=f"median {share(median, 1.0)}")
    ax.plot([], [], " ", label=f"dead: {n_dead:,} (not shown)")
    ax.plot([], [], " ", label=f"on over 10 % of tokens: {int((alive > 0.1).sum()):,}")
    dress(
        ax,
        f"{len(alive):,} of {len(density):,} latents fire, the median on {share(median, 1.0)}",
        f"share of {n_rows:,} tokens on which a latent fires (log)",
        "latents",
    )
    plain_log_ticks(ax.xaxis, 10.0**first, 1.0, percent=True)
    legend(ax)


def values_panel(ax: Axes, values: Float[Tensor, " n"], latent: int | None = None) -> None:
    """How strongly one latent fires where it fires."""
    name = "The latent" if latent is None else f"Latent {latent}"
    numbers = values.float().cpu().numpy()
    active = numbers[numbers > 0]
    if not len(active):
        note(ax, name, f"does not fire on any of these {len(numbers):,} tokens")
        return
    ax.hist(active, bins=40, color=BLUE, edgecolor="white", linewidth=0.4, log=True)
    dress(
        ax,
        f"{name} fires on {share(len(active), len(numbers))} of {len(numbers):,} tokens, up to {active.max():.3g}",
        "feature activation, where above 0",
        "tokens (log)",
    )
    ax.set_xlim(left=0)


# --- decoder directions ----------------------------------------------------------------------------------------------


def nearest_cosines(sae: SAE) -> Float[Tensor, " d_sae"]:
    """For each latent the largest |cosine| between its decoder direction and any other, block by block."""
    best = torch.zeros(sae.d_sae)
    for row, col, block in decoder_similarity_blocks(sae):
        block = block.abs()
        if row == col:
            block.fill_diagonal_(0.0)
        rows, columns = slice(row, row + block.shape[0]), slice(col, col + block.shape[1])
        best[rows] = torch.maximum(best[rows], block.amax(dim=1))
        best[columns] = torch.maximum(best[columns], block.amax(dim=0))
    return best


def random_nearest_cosine(d_in: int, d_sae: int, *, n_probes: int = 64, seed: int = 0) -> float:
    """The same for a typical one of `d_sae` random directions: what chance alone gives in `d_in` dimensions."""
    generator = torch.Generator().manual_seed(seed)
    probes = torch.nn.functional.normalize(torch.randn(n_probes, d_in, generator=generator), dim=1)
    best = torch.zeros(n_probes)
    for start in range(0, d_sae - 1, 8192):
        others = torch.randn(min(8192, d_sae - 1 - start), d_in, generator=generator)
        best = torch.maximum(best, (torch.nn.functional.normalize(others, dim=1) @ probes.T).abs().amax(dim=0))
    return float(best.median())


def nearest_cosine_panel(ax: Axes, sae: SAE) -> None:
    """How close each decoder direction is to its closest other one, against what random directions give."""
    if sae.d_sae < 2:
        note(ax, "Decoder similarity", "one latent has nothing to be compared with")
        return
    cosines = nearest_cosines(sae)
    chance = random_nearest_cosine(sae.d_in, sae.d_sae)
    ax.hist(cosines.numpy(), bins=list(np.linspace(0, 1, 51)), color=BLUE, edgecolor="white", linewidth=0.4)
    ax.axvline(chance, color=ORANGE, linewidth=1.8, label=f"random directions: {chance:.2f}")
    n_close = int((cosines > 0.9).sum())
    ax.axvspan(0.9, 1.0, color=RED, alpha=0.2, linewidth=0, label=f"nearly the same, over 0.9: {n_close:,}")
    dress(
        ax,
        f"Nearest other direction: median |cosine| {float(cosines.median()):.2f}",
        "largest |cosine| with another decoder direction",
        "latents",
    )
    ax.set_xlim(0, 1)
    legend(ax)


def heat_panel(ax: Axes, sae: SAE, latents: Sequence[int]) -> None:
    """Cosines between the decoder directions of some latents; the diagonal, always 1, is left grey."""
    picked = torch.tensor(list(latents), dtype=torch.int64)
    unit = torch.nn.functional.normalize(sae.W_dec.detach().cpu()[picked].double(), dim=1)
    cosine = (unit @ unit.T).numpy()
    np.fill_diagonal(cosine, math.nan)
    off = np.nan_to_num(cosine)
    limit = max(0.5, float(np.abs(off).max(initial=0.0)))
    ax.set_facecolor("#D9D9D9")
    image = ax.imshow(cosine, cmap=DIVERGING, vmin=-limit, vmax=limit)
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.85)
    bar.set_label("cosine", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    row, col = divmod(int(off.argmax()), len(latents))
    if len(latents) > 1:
        title = f"Most alike here: {latents[row]} and {latents[col]}, cosine {off[row, col]:.2f}"
    else:
        title = f"Latent {latents[0]}"
    dress(ax, title, "latent", "latent")
    ax.grid(False)
    ax.set_xticks(range(len(latents)), labels=[str(i) for i in latents], rotation=90, fontsize=7)
    ax.set_yticks(range(len(latents)), labels=[str(i) for i in latents], fontsize=7)
    if len(latents) <= 12:
        for i in range(len(latents)):
            for j in range(len(latents)):
                if i != j:
                    dark = abs(cosine[i, j]) > 0.6 * limit
                    color = "white" if dark else "black"
                    ax.text(j, i, f"{cosine[i, j]:.2f}", ha="center", va="center", fontsize=6.5, color=color)


# --- effects ---------------------------------------------------------------------------------------------------------


def ranking_panel(
    ax: Axes, rows: Sequence[Mapping[str, Any]], *, n_labels: int = 6, names: Mapping[int, str] | None = None
) -> None:
    """Mean KL of each latent by its rank. `names` says something beside the number of a labelled latent."""
    ranked = sorted(((float(row["mean_kl"]), int(row["feature_idx"])) for row in rows), key=lambda pair: -pair[0])
    effective = [(kl, latent) for kl, latent in ranked if kl > 0]
    if not effective:
        note(ax, "Effect of removing a latent", f"none of {len(ranked):,} latents changes a prediction on these texts")
        return
    kls = np.array([kl for kl, _ in effective])
    ax.loglog(np.arange(1, len(kls) + 1), kls, ".", color=BLUE, markersize=4)
    lines = []
    for rank, (kl, latent) in enumerate(effective[:n_labels], start=1):
        ax.plot(rank, kl, "o", color=ORANGE, markersize=5)
        named = f"  {token_labels([names[latent]])[0]}" if names and latent in names else ""
        lines.append(f"{rank:>2}. {latent:>7} {kl:>9.3g}{named}")
    lowest = max(kls.min(), kls.max() * SMALLEST_EFFECT)
    n_below = int((kls < lowest).sum())
    lines = ["     latent   mean KL", *lines, *([f"{n_below} below this axis"] if n_below else [])]
    text = "\n".join(lines)
    ax.text(
        0.03, 0.04, text, transform=ax.transAxes, fontsize=8, family="monospace", va="bottom", parse_math=False,
        bbox={"facecolor": "white", "edgecolor": "#CCCCCC", "alpha": 0.9, "boxstyle": "round,pad=0.4"},
    )  # fmt: skip
    n_top = min(10, len(kls))
    top = float(kls[:n_top].sum() / kls.sum())
    silent = len(ranked) - len(effective)
    dress(
        ax,
        f"Top {n_top}: {share(top, 1.0)} of the summed effect; {silent:,} have none",
        f"rank among {len(ranked):,} latents (log)",
        "mean KL(clean || latent removed), nats (log)",
    )
    ax.set_xlim(left=0.8)
    ax.set_ylim(bottom=0.5 * lowest)


def position_bars(
    ax: Axes, tokens: Sequence[str], values: Float[Tensor, " pos"], *, title: str, ylabel: str, color: str = BLUE
) -> None:
    """A bar a token, the tokens below."""
    ax.bar(range(len(tokens)), values.float().cpu().numpy(), color=color, width=0.85)
    dress(ax, title, "", ylabel)
    ax.grid(False, axis="x")
    ax.set_xlim(-0.7, len(tokens) - 0.3)


def token_ticks(ax: Axes, tokens: Sequence[str], *, always: int, most: int = 140) -> None:
    """Tokens below an axis; every second, third, ... one where there are too many to read, and the one at `always`."""
    step = max(1, math.ceil(len(tokens) / most))
    # Beside `always` none is shown that it would be drawn over.
    shown = sorted({i for i in range(0, len(tokens), step) if abs(i - always) >= step} | {always})
    labels, size = token_labels(tokens), 8 if len(tokens) <= 80 else 6.5
    ax.set_xticks(shown, labels=[labels[i] for i in shown], rotation=90, fontsize=size, parse_math=False)
    ax.get_xticklabels()[shown.index(always)].set_fontweight("bold")
    ax.set_xlabel("token (\u00b7 is a blank)", fontsize=9)


def before_after_panel(
    ax: Axes, tokens: Sequence[str], clean: Float[Tensor, " pos"], ablated: Float[Tensor, " pos"]
) -> None:
    """Log-probability of the token that comes next, with and without the latent."""
    x = np.arange(len(tokens))
    before, after = clean.float().cpu().numpy(), ablated.float().cpu().numpy()
    moved = np.abs(before - after) > VISIBLE_CHANGE
    ax.plot(x[~moved], before[~moved], ".", color="#BBBBBB", markersize=4, label=f"moves by under {VISIBLE_CHANGE:g}")
    ax.vlines(x[moved], before[moved], after[moved], color=GREY, linewidth=1.0, zorder=1)
    ax.plot(x[moved], before[moved], "o", color=SKY, markersize=5, label="before")
    ax.plot(x[moved], after[moved], "v", color=RED, markersize=5, label="after")
    drop = float(np.nanmean(before - after)) if np.isfinite(before - after).any() else 0.0
    dress(
        ax,
        f"Next token: {abs(drop):.2g} nats {'less' if drop >= 0 else 'more'} likely",
        "",
        "log-probability of\nthe next token, nats",
    )
    ax.set_xlim(-0.7, len(tokens) - 0.3)
    legend(ax, loc="lower right", ncols=3, bbox_to_anchor=(1.0, 1.0), borderaxespad=0.1)


# --- comparisons -----------------------------------------------------------------------------------------------------


def comparison_panel(ax: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Best cosine of each left latent, those that are each other's nearest apart from the rest."""
    cosines = np.array([float(row["cosine_similarity"]) for row in rows])
    mutual = np.array([str(row.get("mutual_nearest", "")).lower() == "true" for row in rows])
    known = any(row.get("mutual_nearest") is not None for row in rows)
    lowest = min(0.0, math.floor(cosines.min(initial=0.0) * 10) / 10)
    bins = list(np.linspace(lowest, 1, round((1 - lowest) * 40) + 1))
    parts = [cosines[mutual], cosines[~mutual]] if known else [cosines]
    labels = [f"each other's nearest: {mutual.sum():,}", f"one-sided: {(~mutual).sum():,}"] if known else ["all"]
    colors = [BLUE, ORANGE][: len(parts)]
    ax.hist(parts, bins=bins, stacked=True, color=colors, label=labels, edgecolor="white", linewidth=0.3)
    mutual_text = f"{share(int(mutual.sum()), len(rows))} mutual nearest, " if known else ""
    dress(
        ax,
        f"{mutual_text}median cosine {float(np.median(cosines)):.2f}",
        "cosine with the best match in the other SAE",
        f"latents, of {len(rows):,}",
    )
    ax.set_xlim(lowest, 1)
    legend(ax, loc="upper left")
