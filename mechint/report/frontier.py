"""The figure of a sweep: what sparsity costs, one line for each architecture."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mechint.report.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    dress,
    legend,
    new_figure,
    note,
    plain_log_ticks,
)

Rows = Sequence[Mapping[str, Any]]
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def frontier(rows: Rows, *, note_text: str = "") -> Figure:
    """L0 against FVU, and against the cross-entropy recovered, of the rows of a sweep's results.csv.

    Every member is a point; the line of an architecture joins those of its members that none of it beats in both; rings
    are the members that none of the whole sweep beats in L0 and FVU. `note_text` says why a panel is empty.
    """
    fig = new_figure(11.0, 4.4)
    left, right = fig.subplots(1, 2)
    _panel(left, rows, "fvu", better=-1, title="Variance left unexplained", ylabel="FVU, held-out rows (log)", why="")
    title = "Cross-entropy recovered"
    _panel(right, rows, "ce_recovered_mean", better=1, title=title, ylabel="share against mean ablation", why=note_text)
    return fig


def best_of(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """The points `(l0, value)`, by rising L0, whose value no point of the same or a lower L0 reaches. `better` is -1
    where small values are good, 1 where large ones are."""
    found: list[tuple[float, float]] = []
    for l0, value in sorted(points, key=lambda point: (point[0], -better * point[1])):
        if not found or better * value > better * found[-1][1]:
            found.append((l0, value))
    return found


def _panel(ax: Axes, rows: Rows, column: str, *, better: int, title: str, ylabel: str, why: str) -> None:
    known = [row for row in rows if row.get("l0") is not None and row.get(column) is not None and row["l0"] > 0]
    if column == "fvu":
        known = [row for row in known if row[column] > 0]
    if not known:
        note(ax, title, textwrap.fill(why or "no member has been measured", 48))
        return
    architectures = list(dict.fromkeys(row["architecture"] for row in known))
    for index, architecture in enumerate(architectures):
        points = [(float(row["l0"]), float(row[column])) for row in known if row["architecture"] == architecture]
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        ax.plot(*zip(*best_of(points, better), strict=True), color=color, linewidth=1.6)
        ax.plot(*zip(*points, strict=True), marker, color=color, markersize=5, label=architecture)
    if rings := [(row["l0"], row[column]) for row in known if row.get("pareto")]:
        ax.plot(
            *zip(*rings, strict=True),
            "o",
            color="none",
            markeredgecolor="black",
            markersize=10,
            label="on the frontier",
        )
    dress(ax, title, "L0: active latents a token (log)", ylabel)
    ax.set_xscale("log")
    l0 = [float(row["l0"]) for row in known]
    plain_log_ticks(ax.xaxis, min(l0), max(l0))
    if column == "fvu":
        values = [float(row[column]) for row in known]
        ax.set_yscale("log")
        plain_log_ticks(ax.yaxis, min(values), max(values))
    legend(ax)
