"""Reading the texts of one local file, whatever its format: text, JSON lines, JSON, CSV or Parquet, packed or not."""

import contextlib
import csv
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mechint.config.base import Unit
from mechint.data.documents import Content, content_of, missing_field
from mechint.errors import MechintError, one_line

Found = Iterator[tuple[Content, str]]  # a text, and where it stands

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What a folder is read for; files of the second group often lie beside others and describe them, so they count only
# where there is none of the first.
FIRST, SECOND = (".txt", ".jsonl", ".parquet"), (".json", ".csv", ".tsv")
FORMATS = ", ".join((*FIRST, *SECOND)) + ", and .gz or .zst of the text ones"


@dataclass
class Progress:
    """How far a file has been read, as a share of it."""

    share: Callable[[], float] = lambda: 0.0


def format_of(file: Path) -> str | None:
    """The suffix that tells a file's format, without that of its compression; None for what holds no texts."""
    name = Path(file.name.lower())
    if name.suffix not in COMPRESSIONS:
        return name.suffix if name.suffix in (*FIRST, *SECOND) else None
    inner = Path(name.stem).suffix
    return inner if inner in (*FIRST, *SECOND) and inner != ".parquet" else None  # Parquet packs its own columns


def texts_of(file: Path, kind: str, field: str, unit: Unit, progress: Progress) -> Found:
    """The texts of a file of one of the formats, in order. `unit` divides a .txt only; the other formats hold records.

    Raises:
        MechintError: a file that cannot be read or is not what its name says, with the line or row; see `content_of`.
    """
    if kind == ".txt":
        yield from _whole(file, progress) if unit == "file" else _lines(file, progress)
        return
    records = {".jsonl": _jsonl, ".json": _json, ".csv": _table, ".tsv": _table}
    found = _parquet(file, field, progress) if kind == ".parquet" else records[kind](file, progress)
    for record, where in found:
        yield content_of(record, field, where), where


def txt_lines(file: Path, progress: Progress | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file with their line ends. Raises `MechintError` naming a line that is not UTF-8."""
    with _opened(file, progress or Progress()) as stream:
        for number, line in enumerate(stream, 1):
            yield _utf8(line, f"{file}, line {number}", first=number == 1)


def _utf8(data: bytes, where: str, *, first: bool) -> str:
    try:
        # a byte-order mark, which some editors write, is no part of the first text
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise MechintError(
            f"{where}: not UTF-8 ({error.reason}); convert the file, for example with iconv -t UTF-8"
        ) from error


@contextlib.contextmanager
def _opened(file: Path, progress: Progress) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked."""
    packed = COMPRESSIONS.get(file.suffix.lower())
    with _readable(file), open(file, "rb") as raw:
        size = max(os.fstat(raw.fileno()).st_size, 1)
        # once the last text is read, the file may be closed before anybody asks
        progress.share = lambda: 1.0 if raw.closed else min(raw.tell() / size, 1.0)
        if packed is None:
            yield raw
            return
        import pyarrow

        try:
            with io.BufferedReader(pyarrow.CompressedInputStream(raw, packed), 2**18) as stream:  # type: ignore[arg-type]
                yield stream
        except OSError as error:
            if error.errno is not None:
                raise
            raise MechintError(f"{file} is not a whole {packed} file: {one_line(error)}") from error


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MechintError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error


def _lines(file: Path, progress: Progress) -> Found:
    for number, line in enumerate(txt_lines(file, progress), 1):
        if text := line.strip():  # an empty line divides texts; it is none
            yield text, f"{file}, line {number}"


def _whole(file: Path, progress: Progress) -> Found:
    text = "".join(txt_lines(file, progress)).replace("\r\n", "\n").strip()
    yield text, str(file)


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise MechintError(f"{where}: not JSON ({error.msg})") from error


def _jsonl(file: Path, progress: Progress) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(txt_lines(file, progress), 1):
        if line.strip():
            where = f"{file}, line {number}"
            yield _parsed(line, where), where


def _json(file: Path, progress: Progress) -> Iterator[tuple[Any, str]]:
    """A list of records or strings, or one record; JSON lines, which often bear this name, too."""
    text = "".join(txt_lines(file, progress))
    progress.share = lambda: 0.0  # all of it is in memory, and how far along we are is known below
    try:
        whole = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(file, progress)
            return
        raise MechintError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error
    records = whole if isinstance(whole, list) else [whole]
    for number, record in enumerate(records, 1):
        progress.share = lambda number=number: number / len(records)
        yield record, f"{file}, record {number}"


def _table(file: Path, progress: Progress) -> Iterator[tuple[Any, str]]:
    """Rows under a header, as objects. A row that is too short lacks its last fields, which counts as blank."""
    csv.field_size_limit(2**31 - 1)
    tab = format_of(file) == ".tsv"
    rows = csv.DictReader(txt_lines(file, progress), delimiter="\t" if tab else ",", strict=True)
    try:
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            if None in row:
                raise MechintError(
                    f"{where}: more fields than the header's {len(rows.fieldnames or [])}; quote fields that hold"
                    f" {'tabs' if tab else 'commas'}"
                )
            yield row, where
    except csv.Error as error:
        raise MechintError(f"{file}, line {rows.reader.line_num}: not CSV ({one_line(error)})") from error


def _parquet(file: Path, field: str, progress: Progress) -> Iterator[tuple[Any, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _opened(file, progress) as stream, pyarrow.parquet.ParquetFile(stream) as table:
            names = table.schema_arrow.names
            column = field if field in names else field.split(".")[0]
            if column not in names:
                raise missing_field(field, names, str(file))
            columns = [column, *({"attention_mask"} & set(names) - {column})]
            number, n_rows = 0, max(table.metadata.num_rows, 1)
            progress.share = lambda: number / n_rows
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for record in records_of(batch, file, number + 1):
                    number += 1
                    yield record, f"{file}, row {number}"
    except pyarrow.ArrowException as error:
        raise MechintError(f"{file} is not a readable parquet file: {one_line(error)}") from error


def records_of(batch: Any, file: Path | str, first: int) -> list[dict[str, Any]]:
    """The rows of an Arrow batch or table as Python objects, `first` being the number of its first row."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(len(batch)):
            try:
                batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError as error:
                raise MechintError(f"{file}, row {first + at}: not UTF-8 ({error.reason})") from error
        raise
