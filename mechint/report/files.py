"""Figures of a run for papers: `figures/*.png`, each with the numbers that it shows as a tidy `*.csv` beside it.

A figure is drawn if what it shows has been measured; `write_figures` makes none that would be empty.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mechint.analysis import Latents
from mechint.eval import read_metrics_csv
from mechint.provenance import make_dir, write_text
from mechint.report import figures, panels
from mechint.report.facts import Reported, number
from mechint.report.latents import Look
from mechint.report.style import BLUE, ORANGE, RED, SKY, dress, legend, new_figure, save_figure
from mechint.sae import SAE

CONCEPT_BARS = 30


def write_figures(
    place: Reported, facts: dict[str, Any], sae: SAE, gathered: Latents | None, shown: Look | None
) -> list[Path]:
    """Write the figures and tables into the folder `figures` of what the report is about; returns the paths."""
    folder = place.path / "figures"
    make_dir(folder)
    written: list[Path] = []

    def put(name: str, figure: Figure, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        save_figure(figure, folder / f"{name}.png")
        write_table(folder / f"{name}.csv", header, rows)
        written.extend([folder / f"{name}.png", folder / f"{name}.csv"])

    metrics = [] if place.run is None else read_metrics_csv(place.run.metrics_path)
    if metrics:
        names = list(metrics[0])
        rows = ([row.get(name) for name in names] for row in metrics)
        put("training", figures.training_curves(metrics, d_sae=sae.d_sae), names, rows)
    if gathered is not None:
        figure = figures.activation_density_histogram(gathered.counts, gathered.n_rows)
        counts = gathered.counts.tolist()
        rows = ([latent, count, count / gathered.n_rows] for latent, count in enumerate(counts))
        put("density", figure, ["latent", "n_active", "density"], rows)
    if (l0 := facts["quality"].get("l0_histogram")) and l0.get("counts"):
        rows = zip(l0["edges"][:-1], l0["edges"][1:], l0["counts"], strict=True)
        put(
            "l0",
            l0_figure(l0["edges"], l0["counts"], number(facts["quality"].get("l0"))),
            ["from", "to", "tokens"],
            rows,
        )
    if sae.d_sae > 1:
        nearest = panels.nearest_cosines(sae).tolist()
        put("decoder", figures.decoder_similarity(sae), ["latent", "nearest_abs_cosine"], enumerate(nearest))
    if shown is not None:
        _effects(put, shown)
    if facts["concepts"]:
        scored = [row for row in facts["concepts"]["rows"] if number(row.get("f1")) is not None]
        names = list(facts["concepts"]["rows"][0])
        rows = ([row.get(name) for name in names] for row in facts["concepts"]["rows"])
        if scored:
            put("concepts", concepts_figure(scored), names, rows)
    return written


def _effects(put: Any, shown: Look) -> None:
    effect, exact, attribution = shown.arrays["effect"], shown.arrays["exact"], np.abs(shown.arrays["attribution"])
    measured = np.isfinite(effect).nonzero()[0]
    if len(measured):
        order = measured[np.argsort(-effect[measured], kind="stable")]
        rows = [{"feature_idx": int(latent), "mean_kl": float(effect[latent])} for latent in order]
        table = ([rank, row["feature_idx"], row["mean_kl"]] for rank, row in enumerate(rows, start=1))
        put("effects", figures.ranking(rows), ["rank", "latent", "mean_kl"], table)
    both = (np.isfinite(attribution) & np.isfinite(exact)).nonzero()[0]
    usable = both[(attribution[both] > 0) & (exact[both] > 0)]
    if len(usable) > 2:
        control = shown.arrays["control"]
        rows = ([int(i), float(attribution[i]), float(exact[i]), "control" if control[i] else "top"] for i in both)
        figure = attribution_figure(attribution[usable], exact[usable], control[usable] == 1)
        put("attribution", figure, ["latent", "attribution", "mean_kl", "sample"], rows)
    if "map" in shown.arrays:
        points = shown.arrays["map"].reshape(-1, 2) / 32767
        fires = shown.arrays["fires"] / max(shown.header["n_rows"], 1)
        rows = ([latent, x, y, density] for latent, ((x, y), density) in enumerate(zip(points, fires, strict=True)))
        put("map", map_figure(points, fires), ["latent", "x", "y", "density"], rows)


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV, atomically; what is not known is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if value is None else _cell(value) for value in row] for row in rows])
    write_text(path, text.getvalue())


def _cell(value: Any) -> Any:
    return f"{value:.9g}" if isinstance(value, (float, np.floating)) else value


def l0_figure(edges: Sequence[float | int], counts: Sequence[int], mean: float | None) -> Figure:
    """How many tokens have how many active latents."""
    fig = new_figure(7.0, 3.6)
    ax = fig.subplots()
    widths = np.diff(np.asarray(edges, dtype=np.float64))
    ax.bar(edges[:-1], counts, width=widths, align="edge", color=BLUE, edgecolor="white", linewidth=0.3)
    if mean is not None:
        ax.axvline(mean, color=ORANGE, linewidth=1.8, label=f"mean {mean:.1f}")
        legend(ax)
    last = max((index for index, count in enumerate(counts) if count), default=0)
    ax.set_xlim(edges[0], edges[last + 1])
    dress(ax, "Active latents a token", "active latents on a token (L0)", "held-out tokens")
    return fig


def attribution_figure(attribution: np.ndarray, effect: np.ndarray, control: np.ndarray) -> Figure:
    """The fast estimate against the exact effect, both on log axes."""
    fig = new_figure(6.4, 4.8)
    ax = fig.subplots()
    for picked, color, label in ((~control, BLUE, "top of the fast ranking"), (control, ORANGE, "random control")):
        if picked.any():
            ax.loglog(attribution[picked], effect[picked], "o", color=color, markersize=4, alpha=0.75, label=label)
    title = f"Fast estimate against exact effect, {len(effect):,} latents"
    dress(ax, title, "estimate of the effect (log)", "mean KL when removed, nats (log)")
    legend(ax)
    return fig


def concepts_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """F1 of the best latent for the concepts that are found best, beside the baselines where they were measured."""
    rows = sorted(rows, key=lambda row: -float(row["f1"]))[:CONCEPT_BARS]
    fig = new_figure(7.0, 1.2 + 0.2 * len(rows))
    ax = fig.subplots()
    places = np.arange(len(rows))
    ax.barh(places, [float(row["f1"]) for row in rows], color=SKY, height=0.72, label="best latent")
    for key, marker, color, label in (
        ("token_f1", "|", "black", "list of tokens"),
        ("pca_f1", "d", ORANGE, "PCA"),
        ("random_f1", "x", RED, "random SAE"),
    ):
        known = [(value, place) for place, row in enumerate(rows) if (value := _baseline(row.get(key))) is not None]
        if known:
            values, heights = zip(*known, strict=True)
            ax.plot(values, heights, marker, color=color, label=label, markersize=5, linestyle="none")
    ax.set_yticks(places, labels=[str(row["concept"]) for row in rows], fontsize=8, parse_math=False)
    ax.invert_yaxis()
    ax.set_xlim(0, 1)
    dress(ax, f"The {len(rows)} best found concepts", "F1 on held-out texts", "")
    ax.grid(False, axis="y")
    fig.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return fig


def _baseline(cell: Any) -> float | None:
    """A number, also as the text of a CSV's cell; None for an empty one."""
    try:
        return number(float(cell))
    except (TypeError, ValueError):
        return None


def map_figure(points: np.ndarray, density: np.ndarray) -> Figure:
    """The decoder map, darker where a latent fires more often; dead latents are grey."""
    fig = new_figure(6.4, 5.6)
    ax = fig.subplots()
    alive = density > 0
    ax.scatter(*points[~alive].T, s=8, color="#CCCCCC", linewidths=0)
    drawn = ax.scatter(*points[alive].T, s=10, c=np.log10(density[alive]), cmap="viridis_r", linewidths=0)
    bar = fig.colorbar(drawn, ax=ax, shrink=0.8)
    bar.set_label("share of tokens it fires on, log10", fontsize=9)
    dress(ax, "Decoder directions (t-SNE)", "", "")
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    ax.set_aspect("equal")
    return fig
