"""Baseline beside steered text, for a terminal."""

import shutil
import textwrap
from collections.abc import Sequence

from mechint.steering.steer import Steered

# Narrower columns break nearly every line.
MIN_COLUMN = 28
GAP = " | "


def beside(results: Sequence[Steered], *, layout: str = "auto", width: int | None = None) -> str:
    """One prompt's texts under its prompt: in columns, the baseline first, or stacked where they do not fit.

    Args:
        layout: "columns", "stacked", or "auto" for columns if each has 28 characters.
        width: of the page, in characters; the terminal's if not given.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    room = (width - len(GAP) * (len(results) - 1)) // len(results)
    prompt = textwrap.fill(f"prompt: {_shown(results[0].prompt)}", width, subsequent_indent="        ")
    if layout == "stacked" or (layout == "auto" and room < MIN_COLUMN):
        blocks = [
            "\n".join([f"[{one.setting}] {_numbers(one)}", *_wrapped(one.text, width - 2, indent="  ")])
            for one in results
        ]
        return "\n".join([prompt, *blocks])
    room = max(room, 12)
    heads = [[one.setting, *_wrapped(_numbers(one), room)] for one in results]
    head_height = max(map(len, heads))
    columns = [
        [*head, *[""] * (head_height - len(head)), "-" * room, *_wrapped(one.text, room)]
        for head, one in zip(heads, results, strict=True)
    ]
    height = max(map(len, columns))
    lines = [
        GAP.join((column[i] if i < len(column) else "").ljust(room) for column in columns).rstrip()
        for i in range(height)
    ]
    return "\n".join([prompt, *lines])


def _numbers(one: Steered) -> str:
    nll = "no text" if one.nll is None else f"{one.nll:.2f} nats/token"
    return nll if one.setting == "baseline" else f"{nll}, next-token KL {one.next_kl:.2f}"


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    return textwrap.wrap(_shown(text), width, initial_indent=indent, subsequent_indent=indent) or [indent + "(nothing)"]


def _shown(text: str) -> str:
    """The text without what moves a terminal's cursor: line breaks as a sign, other control characters escaped."""
    lines = text.replace("\n", " ⏎ ")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in lines).strip()
