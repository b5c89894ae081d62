"""Texts from local files and folders, and from the built-in tales."""

import glob
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mechint.config.base import Unit
from mechint.data.documents import Document, content_of, missing_field, without_blanks
from mechint.data.text_files import FIRST, FORMATS, SECOND, Progress, format_of, records_of, texts_of
from mechint.errors import MechintError, nearest, one_line
from mechint.provenance import sha256_json

OTHER_SOURCES = "use --dataset FILE.txt (or .jsonl, .json, .csv, .parquet, a folder or glob) or --dataset builtin/tales"


def is_local(dataset: str) -> bool:
    """Whether `dataset` names local files: one that exists, a glob, or what looks like a path."""
    path = Path(dataset).expanduser()
    return (
        path.exists()
        or any(sign in dataset for sign in "*?[")
        or format_of(path) is not None
        or dataset.startswith((".", "/", "~", "\\"))
        or dataset.count("/") > 1
    )


def open_local(dataset: str, split: str, field: str, unit: Unit | None, max_chars: int) -> "FileTexts | DatasetTexts":
    """The texts of a file, a folder, a glob, or a folder that `datasets` saved. Raises `MechintError` for none."""
    path = Path(dataset).expanduser()
    if path.is_dir() and (saved := saved_dataset(path, split)) is not None:
        if unit not in (None, "record"):
            raise MechintError(f"--unit {unit}: {dataset} holds records; leave --unit out")
        return DatasetTexts(dataset, saved, split, field, max_chars)
    if split != "train":
        raise MechintError(f"--split {split}: local files have no splits; name the file of that split instead")
    files, left_out = local_files(dataset)
    return FileTexts(dataset, files, field, max_chars, unit, left_out)


def local_files(dataset: str) -> tuple[list[Path], list[Path]]:
    """The files with texts that `dataset` names, sorted, and those of a folder or glob that are left out.

    A .json or .csv beside files of other formats describes them as a rule, so it is left out; a glob that matches
    nothing else, or its own name, takes it.
    """
    path = Path(dataset).expanduser()
    if path.is_file():
        if format_of(path) is None:
            raise MechintError(f"{dataset}: texts are read from {FORMATS}; this is none of them")
        return [path], []
    if path.is_dir():
        found = [file for file in path.rglob("*") if not _hidden(file.relative_to(path))]
        nothing = f"folder {dataset} holds no file of a known format ({FORMATS})"
    elif any(sign in dataset for sign in "*?["):
        found = [Path(name) for name in glob.glob(str(path), recursive=True)]
        nothing = f"no file of a known format ({FORMATS}) matches {dataset}"
    else:
        raise MechintError(f"no such file or folder: {dataset}; {OTHER_SOURCES}")
    found = sorted(file for file in found if file.is_file())
    for formats in (FIRST, SECOND):
        if files := [file for file in found if format_of(file) in formats]:
            return files, [file for file in found if format_of(file) not in formats]
    raise MechintError(nothing)


def _hidden(file: Path) -> bool:
    return any(part.startswith(".") for part in file.parts)


class InOrder(ABC):
    """Reads a source of documents forward from any number on, from the first one again if it must go back."""

    by_rank = False
    _documents: Iterator[Document] | None = None
    _next = 0

    @abstractmethod
    def _all(self) -> Iterator[Document]:
        """Every document, from the first on."""

    def read(self, start: int, count: int) -> list[Document]:
        if self._documents is None or start < self._next:
            self._documents, self._next = self._all(), 0
        found: list[Document] = []
        for document in self._documents:
            self._next += 1
            if self._next > start:
                found.append(document)
            if self._next >= start + count:
                break
        return found

    def state(self) -> None:
        return None

    def close(self) -> None:
        self._documents = None


class TaleTexts:
    """The built-in tales; any text can be had at once."""

    by_rank = False
    said = "built-in tales"

    def __init__(self, split: str, seed: int):
        if split not in ("train", "heldout"):
            raise MechintError(f"builtin/tales has no split {split!r}; {nearest(split, ('train', 'heldout'))}")
        self.split: Literal["train", "heldout"] = "train" if split == "train" else "heldout"
        self.seed = seed

    def read(self, start: int, count: int) -> list[Document]:
        from mechint.builtin.tales import tale

        return [Document(tale(i, self.split, self.seed).text, f"tale {i}") for i in range(start, start + count)]

    def state(self) -> None:
        return None

    def about(self) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        from mechint.builtin.tales import source_hash

        return {
            "text_source": "builtin",
            "dataset_name": "builtin/tales",
            "dataset_split": self.split,
            "dataset_revision": source_hash(),
            "text_field": None,
            "text_unit": "record",
        }

    def fingerprint(self) -> str:
        from mechint.builtin.tales import source_hash

        return source_hash()

    def close(self) -> None:
        pass


class FileTexts(InOrder):
    """The texts of files, file after file in the order of their names.

    If `unit` is None, several .txt files (a folder or a glob) give a text each, a single one gives a text a line.
    `plain` takes files for .txt whatever their names.
    """

    def __init__(
        self,
        dataset: str,
        files: list[Path],
        field: str,
        max_chars: int,
        unit: Unit | None = None,
        left_out: list[Path] | None = None,
        *,
        plain: bool = False,
    ):
        self.dataset, self.files, self.field, self.max_chars = dataset, files, field, max_chars
        self.left_out = left_out or []
        self.kinds = [".txt" if plain else str(format_of(file)) for file in files]
        kinds = Counter(self.kinds)
        n_plain = kinds.pop(".txt", 0)
        if unit in ("line", "file") and not n_plain:
            raise MechintError(f"--unit {unit} divides .txt files, and {dataset} holds records: leave --unit out")
        if unit == "record" and n_plain:
            raise MechintError(f"--unit record: {dataset} holds .txt files, which are read by line or file")
        self.unit: Unit = unit or (
            "record" if not n_plain else "line" if files == [Path(dataset).expanduser()] else "file"
        )
        self.has_records = bool(kinds)
        self._file, self._progress = 0, Progress()

    @property
    def said(self) -> str:
        """What is read, for a person."""
        n = f"{len(self.files)} files of {self.dataset}" if len(self.files) > 1 else str(self.files[0])
        field = f"field {self.field}" if self.has_records else ""
        what = {"line": "one text a line", "file": "one text a file", "record": "one text a record"}[self.unit]
        if self.has_records and self.unit != "record":
            what = f"{what} of .txt, one a record of the others"
        parts = [f"{n}, {what}", field]
        if self.left_out:
            kinds = Counter(file.suffix or file.name for file in self.left_out)
            listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
            parts.append(f"not read there: {listed}")
        return "; ".join(part for part in parts if part)

    def _all(self) -> Iterator[Document]:
        def found() -> Iterator[tuple[Any, str]]:
            for number, file in enumerate(self.files):
                self._file = number
                yield from texts_of(file, self.kinds[number], self.field, self.unit, self._progress)
            self._file, self._progress = len(self.files), Progress()

        return without_blanks(found(), self.max_chars)

    def about(self) -> int | None:
        """About how many texts there are, judged by those that were read and the bytes that they took."""
        sizes = [file.stat().st_size for file in self.files]
        read = sum(sizes[: self._file])
        if self._file < len(sizes):
            read += round(sizes[self._file] * self._progress.share())
        return round(self._next * sum(sizes) / read) if read else None

    def describe(self) -> dict[str, Any]:
        return {
            "text_source": "files",
            "dataset_name": self.dataset,
            "dataset_split": "train",
            "dataset_revision": None,
            "text_field": self.field if self.has_records else None,
            "text_unit": self.unit,
        }

    def fingerprint(self) -> str:
        return stamps(self.files)


class DatasetTexts(InOrder):
    """The rows of a data set that the datasets library wrote with `save_to_disk`."""

    def __init__(self, dataset: str, folder: Path, split: str, field: str, max_chars: int):
        import datasets

        self.dataset, self.folder, self.split, self.field, self.max_chars = dataset, folder, split, field, max_chars
        try:
            self.table = datasets.Dataset.load_from_disk(str(folder))
        except Exception as error:  # whatever the library and the file system come up with
            raise MechintError(f"{folder} is not a readable saved data set: {one_line(error, 200)}") from error
        names = self.table.column_names
        self.column = field if field in names else field.split(".")[0]
        if self.column not in names:
            raise missing_field(field, names, dataset)

    @property
    def said(self) -> str:
        return f"{len(self.table)} records of the saved data set {self.folder}; field {self.field}"

    def _all(self) -> Iterator[Document]:
        columns = [self.column, *({"attention_mask"} & set(self.table.column_names) - {self.column})]

        def found() -> Iterator[tuple[Any, str]]:
            number = 0
            for batch in self.table.select_columns(columns).with_format("arrow").iter(256):
                for record in records_of(batch, self.dataset, number + 1):
                    number += 1
                    where = f"{self.dataset}, row {number}"
                    yield content_of(record, self.field, where), where

        return without_blanks(found(), self.max_chars)

    def about(self) -> int | None:
        return len(self.table)

    def describe(self) -> dict[str, Any]:
        return {
            "text_source": "files",
            "dataset_name": self.dataset,
            "dataset_split": self.split,
            "dataset_revision": None,
            "text_field": self.field,
            "text_unit": "record",
        }

    def fingerprint(self) -> str:
        return stamps(sorted(file for file in self.folder.iterdir() if file.is_file()))


def saved_dataset(path: Path, split: str) -> Path | None:
    """The folder of one split where `datasets` saved a data set; None if it is no such folder.

    Raises:
        MechintError: a split that is not there.
    """
    if (path / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in path.iterdir() if (part / "state.json").is_file())
        if split not in splits:
            raise MechintError(f"{path} has no split {split!r}: use --split; {nearest(split, splits)}")
        return path / split
    if not ((path / "state.json").is_file() and (path / "dataset_info.json").is_file()):
        return None
    if split != "train":
        raise MechintError(f"--split {split}: {path} holds one data set without splits; leave --split out")
    return path


def stamps(files: list[Path]) -> str:
    """Changes with the names, sizes and times of files."""
    states = [(file, file.stat()) for file in files]
    return sha256_json([[str(file), state.st_size, state.st_mtime_ns] for file, state in states])
