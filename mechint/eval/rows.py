"""metrics.csv: appending rows while a run goes on, and reading the files of every version of the pipeline."""

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path

from mechint.errors import MechintError

METRICS_COLUMNS = ("step", "loss", "mse", "l1", "l0", "dead_features", "lr", "lam")
INTEGER_COLUMNS = frozenset({"step", "dead_features"})


def append_metrics_row(path: str | os.PathLike, row: Mapping[str, int | float | None]) -> None:
    """Append one row; a new or empty file gets a header first (the standard columns, then the other keys of `row`).

    An existing file keeps its own columns: values it has no column for are left out, missing ones are empty. A last
    line without its newline is what a killed process left half written; it is removed first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        _drop_torn_line(file)
        file.seek(0)
        header = file.readline().decode("utf-8").strip()
        columns = header.split(",") if header else [*METRICS_COLUMNS, *(k for k in row if k not in METRICS_COLUMNS)]
        if header and "loss" not in columns:
            raise MechintError(f"{path} is not a metrics file (its first line is {header[:80]!r}): move it away")
        text = "" if header else ",".join(columns) + "\n"
        text += ",".join(_cell(row.get(column)) for column in columns) + "\n"
        file.seek(0, os.SEEK_END)
        file.write(text.encode("utf-8"))


def _drop_torn_line(file: io.BufferedRandom) -> None:
    size = file.seek(0, os.SEEK_END)
    end = size
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        file.truncate(end)


def _cell(value: int | float | None) -> str:
    return "" if value is None else repr(value)


def read_metrics_csv(path: str | os.PathLike) -> list[dict[str, int | float | None]]:
    """The rows of a metrics file under the standard names, in file order.

    Reads all variants: `mse,l1,l0,loss` (no step: None), `step,loss,mse,l1,l0,dead_features`, the eight standard
    columns, and those with more columns behind (kept). Standard columns that the file lacks are None. A half-written
    last line (no newline) is left out. Raises `MechintError` if the file is missing or is not a metrics file.

    `l0` is the mean *fraction* of active latents and `l1` is divided by d_sae too, as these files always had them.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MechintError(f"metrics file not found: {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise MechintError(f"metrics file {path} cannot be read: {error}") from error
    complete = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(io.StringIO(complete)))
    if not lines or not {"loss", "mse", "l1", "l0"} <= set(lines[0]):
        raise MechintError(f"{path} is not a metrics file: its first line should name the columns loss, mse, l1 and l0")
    header = lines[0]
    return [_parse(header, cells, path, number) for number, cells in enumerate(lines[1:], start=2) if cells]


def _parse(header: list[str], cells: list[str], path: Path, number: int) -> dict[str, int | float | None]:
    if len(cells) != len(header):
        raise MechintError(f"{path}, line {number}: {len(cells)} values under {len(header)} columns")
    row: dict[str, int | float | None] = dict.fromkeys(METRICS_COLUMNS)
    for name, cell in zip(header, cells, strict=True):
        try:
            value = float(cell) if cell else None
        except ValueError:
            raise MechintError(f"{path}, line {number}: {name} is not a number: {cell!r}") from None
        row[name] = int(value) if value is not None and name in INTEGER_COLUMNS else value
    return row
