"""What a publish would upload, shown without a network: the panel and the table of a dry run."""

import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

from mechint.hub.bundle import Bundle, stage_dry
from mechint.huggingface.client import check_repo_id, hub_url


class Row(NamedTuple):
    """One line of the table of a dry run."""

    staged_name: str
    source: str  # relative to the current folder; "(generated)"; "missing"
    size: int | None  # bytes; None when missing


def plan(bundle: Bundle, repo_id: str) -> list[Row]:
    """The files that would go up, README.md and bundle_metadata.json first. No network, nothing is written.

    Raises:
        MechintError: what a publish would refuse: a bad name, a token in a file, a name the Hub does not allow.
    """
    check_repo_id(repo_id)
    found = stage_dry(bundle, repo_id)
    rows = [Row(name, "(generated)", file.size) for name, file in found.files.items() if name not in bundle.files]
    for name, source in bundle.files.items():
        if name in found.missing:
            rows.append(Row(name, "missing", None))
        else:
            shown = "(generated)" if isinstance(source, bytes) else _relative(source)
            rows.append(Row(name, shown, found.files[name].size))
    return rows


def dry_run(bundle: Bundle, repo_id: str) -> None:
    """Print the panel and the table of what would be uploaded, to standard output. No network, no credentials."""
    from rich import box
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    rows = plan(bundle, repo_id)
    # A pipe has no width of its own; 120 columns cut little in a log.
    console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120, highlight=False)
    lines = ("DRY RUN — no files uploaded", f"Bundle: {bundle.name}", f"Kind:   {bundle.kind}")
    text = "\n".join([*lines, f"Target: {hub_url(repo_id)}"])
    console.print(Panel.fit(Text(text, overflow="fold"), title="mech publish"))
    table = Table(title="Files that would be uploaded", title_justify="left", title_style="", box=box.SQUARE)
    table.add_column("Staged name", overflow="fold")
    table.add_column("Source path", overflow="ellipsis", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    for row in rows:
        table.add_row(Text(row.staged_name), Text(row.source), "" if row.size is None else format_size(row.size))
    console.print(table)


def format_size(size: int) -> str:
    """A number of bytes as people read it: 407 B, 3.2 KB, 16.0 MB (of 1024 each)."""
    if size < 1024:
        return f"{size} B"
    value = float(size)
    for unit in ("KB", "MB", "GB"):
        value /= 1024
        if value < 1024:
            return f"{value:.1f} {unit}"
    return f"{value / 1024:.1f} TB"


def _relative(path: Path) -> str:
    """The path as seen from here; only its name where it is far away, since the table is often shown to others."""
    with contextlib.suppress(ValueError):
        return path.absolute().relative_to(Path.cwd()).as_posix()
    return f"…/{path.name}"
