"""Texts from local files and from the built-in tales."""

import contextlib
import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mechint.errors import MechintError, nearest, one_line
from mechint.provenance import sha256_json

SUFFIXES = (".txt", ".jsonl", ".parquet")
OTHER_SOURCES = "use --dataset FILE.txt (or .jsonl, .parquet, a folder or glob of them) or --dataset builtin/tales"


def local_files(dataset: str) -> list[Path] | None:
    """The files that `dataset` names, sorted; None if it does not look like a local path at all."""
    path = Path(dataset).expanduser()
    wanted = "/".join(SUFFIXES)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise MechintError(f"{dataset}: texts are read from {wanted} files, this is none of them")
        return [path]
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES and file.is_file())
        if not files:
            raise MechintError(f"folder {dataset} holds no {wanted} file")
        return files
    if any(sign in dataset for sign in "*?["):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
        files = [file for file in found if file.suffix in SUFFIXES and file.is_file()]
        if not files:
            raise MechintError(f"no {wanted} file matches {dataset}")
        return files
    looks_local = path.suffix in SUFFIXES or dataset.startswith((".", "/", "~", "\\")) or dataset.count("/") > 1
    if looks_local:
        raise MechintError(f"no such file or folder: {dataset}; {OTHER_SOURCES}")
    return None


class TaleTexts:
    """The built-in tales; any text can be had at once."""

    by_rank = False

    def __init__(self, split: str, seed: int, max_chars: int):
        if split not in ("train", "heldout"):
            raise MechintError(f"builtin/tales has no split {split!r}; {nearest(split, ('train', 'heldout'))}")
        self.split: Literal["train", "heldout"] = "train" if split == "train" else "heldout"
        self.seed, self.max_chars = seed, max_chars

    def read(self, start: int, count: int) -> list[str]:
        from mechint.builtin.tales import tale

        return [tale(i, self.split, self.seed).text[: self.max_chars] for i in range(start, start + count)]

    def state(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        from mechint.builtin.tales import source_hash

        return {
            "text_source": "builtin",
            "dataset_name": "builtin/tales",
            "dataset_split": self.split,
            "dataset_revision": source_hash(),
            "text_field": None,
        }

    def fingerprint(self) -> str:
        from mechint.builtin.tales import source_hash

        return source_hash()

    def close(self) -> None:
        pass


class FileTexts:
    """Lines of .txt, records of .jsonl and .parquet, file after file in the order of their names."""

    by_rank = False

    def __init__(self, dataset: str, files: list[Path], text_field: str, max_chars: int):
        self.dataset, self.files, self.text_field, self.max_chars = dataset, files, text_field, max_chars
        self._texts: Iterator[str] | None = None
        self._next = 0

    def read(self, start: int, count: int) -> list[str]:
        if self._texts is None or start < self._next:
            self._texts, self._next = self._all(), 0
        found: list[str] = []
        for text in self._texts:
            self._next += 1
            if self._next > start:
                found.append(text)
            if self._next >= start + count:
                break
        return found

    def _all(self) -> Iterator[str]:
        for file in self.files:
            if file.suffix == ".txt":
                texts = (line.strip() for line in txt_lines(file))
            elif file.suffix == ".jsonl":
                texts = _jsonl_texts(file, self.text_field)
            else:
                texts = _parquet_texts(file, self.text_field)
            for text in texts:
                kept = text[: self.max_chars]
                if kept and not kept.isspace():
                    yield kept

    def state(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "text_source": "files",
            "dataset_name": self.dataset,
            "dataset_split": "train",
            "dataset_revision": None,
            "text_field": None if all(file.suffix == ".txt" for file in self.files) else self.text_field,
        }

    def fingerprint(self) -> str:
        states = [(file, file.stat()) for file in self.files]
        return sha256_json([[str(file), state.st_size, state.st_mtime_ns] for file, state in states])

    def close(self) -> None:
        self._texts = None


@contextlib.contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MechintError(f"{file} cannot be read: {error.strerror or one_line(error)}") from error


def txt_lines(file: Path) -> Iterator[str]:
    with _readable(file), open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                # a byte-order mark, which some editors write, is no part of the first text
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise MechintError(
                    f"{file}, line {number}: not UTF-8 ({error.reason}); convert the file, for example with"
                    " iconv -t UTF-8"
                ) from error


def text_of(record: Any, field: str, where: str) -> str:
    """The text in a record. Raises `MechintError` naming the fields that are there."""
    if not isinstance(record, dict):
        raise MechintError(f"{where}: expected an object with a field {field!r}, found {type(record).__name__}")
    if field not in record:
        raise MechintError(f"{where} has no field {field!r}, only {', '.join(record)}: use --text-field")
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        strings = [name for name, value in record.items() if isinstance(value, str)]
        hint = f"; fields with text: {', '.join(strings)}" if strings else ""
        raise MechintError(f"{where}: field {field!r} holds {type(text).__name__}, not text{hint}")
    return text


def _jsonl_texts(file: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(txt_lines(file), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise MechintError(f"{where}: not JSON ({error.msg})") from error
        yield text_of(record, field, where)


def _parquet_texts(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _readable(file), pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if field not in names:
                raise MechintError(f"{file} has no field {field!r}, only {', '.join(names)}: use --text-field")
            kind = table.schema_arrow.field(field).type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise MechintError(f"{file}: field {field!r} holds {kind}, not text")
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    yield text or ""
    except pyarrow.ArrowException as error:
        raise MechintError(f"{file} is not a readable parquet file: {one_line(error)}") from error
