"""How every figure looks: colours, axes, number formats, and the way to the disk. No pyplot, so no global state."""

import os
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from mechint.errors import MechintError
from mechint.provenance import atomic_path

# Okabe and Ito's palette: told apart with every common kind of colour blindness, and in print.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#6F6F6F",
)
DIVERGING = "RdBu_r"
SCREEN_DPI = 100
FILE_DPI = 150


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure, `width` x `height` inches; 8 inches are 1200 pixels in a saved file."""
    return Figure(figsize=(width, height), dpi=SCREEN_DPI, layout="constrained", facecolor="white")


def save_figure(fig: Figure, path: str | os.PathLike) -> None:
    """Write the figure as a PNG with 150 dots per inch; an existing file is replaced, all at once.

    Raises:
        MechintError: `path` does not end in .png, or the disk is full.
    """
    if not os.fspath(path).lower().endswith(".png"):
        raise MechintError(f"figures are saved as PNG: {os.fspath(path)!r} should end in .png")
    with atomic_path(path) as temporary:
        # Without a version and a date in the file, equal figures are equal bytes.
        fig.savefig(temporary, format="png", dpi=FILE_DPI, metadata={"Software": None})


def dress(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Title and labels, a faint grid behind the data, no box. Titles fit a third of a page: 50 characters or so."""
    ax.set_title(title, fontsize=10, loc="left", fontweight="bold", parse_math=False)
    ax.set_xlabel(xlabel, fontsize=9)
    ax.set_ylabel(ylabel, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(True, color="#E4E4E4", linewidth=0.7)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def legend(ax: Axes, **places: Any) -> None:
    ax.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", **places)


def note(ax: Axes, title: str, text: str) -> None:
    """An empty panel that says why it is empty."""
    ax.set_title(title, fontsize=10, loc="left", fontweight="bold", color=GREY, parse_math=False)
    ax.text(
        0.5, 0.5, text, ha="center", va="center", fontsize=9, color=GREY, wrap=True, transform=ax.transAxes,
        parse_math=False,
    )  # fmt: skip
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color("#DDDDDD")


def plain_log_ticks(axis: Axis, lowest: float, highest: float, *, percent: bool = False) -> None:
    """Ticks of a log axis as numbers that people read (20, 50, 100) where it spans few decades, else powers of ten."""
    decades = highest / lowest
    if percent:
        axis.set_major_locator(LogLocator(subs=(1.0,), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    elif decades < 1000:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        return
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def share(part: int | float, whole: int | float) -> str:
    """`part / whole` in percent, with two digits or so: "0.43 %", "12 %"."""
    value = 100 * part / whole if whole else 0.0
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"


def token_labels(tokens: Sequence[str]) -> list[str]:
    """Tokens as they can stand under a bar: leading blanks as a middle dot, line breaks as the sign for return."""
    font = get_font(findfont(FontProperties()))

    def shown(token: str) -> str:
        text = token.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u00b7")
        # A letter that the font lacks would be drawn as a box, with a warning each time.
        text = "".join(c if font.get_char_index(ord(c)) else "\ufffd" for c in text)
        return text if len(text) <= 16 else text[:15] + "\u2026"

    return [shown(token) for token in tokens]
