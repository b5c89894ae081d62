"""Where texts come from: local files, the built-in tales, or a data set on the Hugging Face Hub.

A text is named by its number in the source, counted after blank texts are dropped. Every source reads forward from a
given number, so a collection that was killed goes on at the next text.
"""

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from mechint.errors import MechintError, nearest, one_line
from mechint.provenance import sha256_json

SUFFIXES = (".txt", ".jsonl", ".parquet")
BUILTIN = ("builtin/tales",)
OTHER_SOURCES = "use --dataset FILE.txt (or .jsonl, .parquet, a folder or glob of them) or --dataset builtin/tales"


@runtime_checkable
class TextSource(Protocol):
    """Texts with the numbers `start`, `start + 1`, ... in order.

    `by_rank` says that the source itself gives each process its own texts (numbered from 0 in each); otherwise every
    process sees all of them. `seekable` says that reading ahead costs nothing for what is skipped.
    """

    by_rank: bool
    seekable: bool

    def read(self, start: int, count: int) -> list[str]:
        """Texts `start` to `start + count`; fewer at the end of the source."""
        ...

    def state(self) -> dict[str, Any] | None:
        """A JSON value from which the source goes on after what was read so far; None if `start` alone is enough."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the texts, for the record: the fields from `text_source` to `text_field` of docs/store.md."""
        ...

    def fingerprint(self) -> str:
        """Differs when the source's texts have changed, as far as can be told without reading them."""
        ...

    def close(self) -> None: ...


def open_texts(
    dataset: str,
    split: str = "train",
    *,
    revision: str | None = None,
    text_field: str = "text",
    max_chars: int = 512,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> TextSource:
    """Open a text source. Nothing is read yet but what a Hub data set says about itself.

    Args:
        dataset: `builtin/tales`, a local file, folder or glob, or the id of a Hub data set (`name` or `name:config`).
        max_chars: characters kept of each text; a text that is blank after the cut is dropped.
        seed: of the built-in source.
        rank, world_size: of this process; only Hub data sets are split by it (`split_dataset_by_node`).
        state: what `.state()` gave; the source goes on from there.

    Raises:
        MechintError: no such source, split or revision; Hub out of reach. Reading raises it for a missing field and for
            what cannot be read as text.
    """
    if dataset.startswith("builtin/"):
        if dataset not in BUILTIN:
            raise MechintError(f"unknown built-in data set {dataset!r}; {nearest(dataset, BUILTIN)}")
        _no_revision(dataset, revision)
        return TaleTexts(split, seed, max_chars)
    files = local_files(dataset)
    if files is not None:
        _no_revision(dataset, revision)
        if split != "train":
            raise MechintError(f"--split {split}: local files have no splits; name the file of that split instead")
        return FileTexts(dataset, files, text_field, max_chars)
    from mechint.data.hub_text import HubTexts

    return HubTexts(dataset, split, revision, text_field, max_chars, rank, world_size, state)


def no_texts(dataset: str) -> MechintError:
    """The error for a source that ends before its first text."""
    return MechintError(f"{dataset} has no text: it is empty or all blank; {OTHER_SOURCES}")


def _no_revision(dataset: str, revision: str | None) -> None:
    if revision is not None:
        raise MechintError(f"--revision {revision}: only data sets on the Hub have revisions, {dataset} is local")


def iter_texts_from_path(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 text file, stripped, blank ones dropped. Raises `MechintError` if there is none."""
    path = Path(path)
    if not path.is_file():
        raise MechintError(f"text file not found: {path}; it should hold one text a line")
    texts = [line.strip() for line in _txt_lines(path) if line.strip()]
    if not texts:
        raise MechintError(f"text file {path} is empty; it should hold one text a line")
    return texts


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
    seekable = True

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
    seekable = False

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
                texts = (line.strip() for line in _txt_lines(file))
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


def _txt_lines(file: Path) -> Iterator[str]:
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
    for number, line in enumerate(_txt_lines(file), 1):
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
