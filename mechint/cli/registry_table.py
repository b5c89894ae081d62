"""What a registry holds, as a table on the terminal or as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mechint.cli.flags import print_json

# The end of both commands' help.
PLACES = (
    " Registries lie in the package, in mechint-registry.json of the current folder, and in the files that"
    " MECHINT_REGISTRY names; docs/publish.md says what is in them."
)


def shown(value: object) -> str:
    """A value of somebody else's file, without what could move a terminal's cursor."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(value))


def print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table to standard output. In a pipe no cell is broken over lines, so that it can be searched."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False, soft_wrap=False)
    if not console.is_terminal:
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        console = Console(markup=False, highlight=False, width=sum(widths) + 3 * len(widths) + 1)
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*[Text(shown(cell)) for cell in row])
    console.print(table)


def print_entries(entries: Mapping[str, Any]) -> None:
    """Print descriptors as the JSON of a registry file has them, with their names."""
    values = {name: dataclasses.asdict(entry) for name, entry in entries.items()}
    print_json({name: {key: _json(value) for key, value in entry.items()} for name, entry in values.items()})


def _json(value: Any) -> Any:
    return value if isinstance(value, (dict, int, float, type(None))) else str(value)
