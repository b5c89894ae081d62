"""Where texts come from: local files, the built-in tales, or a data set on the Hugging Face Hub.

A text is named by its number in the source, counted after blank texts are dropped. Every source reads forward from a
given number, so a collection that was killed goes on at the next text.
"""

import os
import sys
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechint.config.base import TEXT_FIELD, Unit
from mechint.data.documents import Document
from mechint.data.local_text import OTHER_SOURCES, FileTexts, TaleTexts, is_local, open_local
from mechint.data.text_files import format_of
from mechint.errors import MechintError, nearest

BUILTIN = ("builtin/tales",)


@runtime_checkable
class TextSource(Protocol):
    """Texts with the numbers `start`, `start + 1`, ... in order.

    `by_rank` says that the source itself gives each process its own texts (numbered from 0 in each); otherwise every
    process sees all of them.
    """

    by_rank: bool

    @property
    def said(self) -> str:
        """What is read, for a person."""
        ...

    def read(self, start: int, count: int) -> list[Document]:
        """Texts `start` to `start + count`, whole; fewer at the end of the source."""
        ...

    def about(self) -> int | None:
        """About how many texts there are, as far as it can be told from what was read; None if it cannot."""
        ...

    def state(self) -> dict[str, Any] | None:
        """A JSON value from which the source goes on after what was read so far; None if `start` alone is enough."""
        ...

    def describe(self) -> dict[str, Any]:
        """What identifies the texts, for the record: the fields from `text_source` to `text_unit` of docs/store.md."""
        ...

    def fingerprint(self) -> str:
        """Differs when the source's texts have changed, as far as can be told without reading them."""
        ...

    def close(self) -> None: ...


def open_texts(
    dataset: str | os.PathLike,
    split: str = "train",
    *,
    revision: str | None = None,
    text_field: str = TEXT_FIELD,
    unit: Unit | None = None,
    max_chars: int = 0,
    seed: int = 42,
    rank: int = 0,
    world_size: int = 1,
    state: dict[str, Any] | None = None,
) -> TextSource:
    """Open a text source. Nothing is read yet but what a data set says about itself.

    Args:
        dataset: `builtin/tales`; a local file, folder or glob; a folder that the datasets library saved; or the id of a
            data set on the Hub (`name` or `name:config`).
        text_field: what holds the text of a record: a string, token ids or a chat; dots reach into nested objects.
        unit: what one text is: a "line" or "file" of .txt, a "record" of the other formats. None: a file of several, a
            line of a single .txt, a record.
        max_chars: a text that is blank in its first so many characters is dropped; 0 looks at all of it.
        seed: of the built-in source.
        rank, world_size: of this process; only Hub data sets are split by it (`split_dataset_by_node`).
        state: what `.state()` gave; the source goes on from there.

    Raises:
        MechintError: no such source, split or revision; Hub out of reach. Reading raises it for a missing field and for
            what cannot be read as text.
    """
    dataset = str(dataset)
    if dataset.startswith("builtin/") and dataset not in BUILTIN:
        raise MechintError(f"unknown built-in data set {dataset!r}; {nearest(dataset, BUILTIN)}")
    if dataset not in BUILTIN and is_local(dataset):
        _no_revision(dataset, revision)
        return open_local(dataset, split, text_field, unit, max_chars)
    if unit not in (None, "record"):
        raise MechintError(f"--unit {unit} divides .txt files, and {dataset} holds records: leave --unit out")
    if dataset in BUILTIN:
        _no_revision(dataset, revision)
        return TaleTexts(split, seed)
    from mechint.data.hub_text import HubTexts

    return HubTexts(dataset, split, revision, text_field, max_chars, rank, world_size, state)


def no_texts(dataset: str) -> MechintError:
    """The error for a source that ends before its first text."""
    return MechintError(f"{dataset} has no text: it is empty or all blank; {OTHER_SOURCES}")


def documents_from(
    path: str | os.PathLike, text_field: str = TEXT_FIELD, unit: Unit | None = None, *, limit: int | None = None
) -> list[Document]:
    """The texts of a local source, as `open_texts` reads them, or the first `limit`. A file whose name tells no format
    is read as lines.

    Raises:
        MechintError: no such file or none of its texts; the built-in tales, which have no end, without a limit.
    """
    path = Path(path).expanduser()
    if str(path) in BUILTIN:
        if limit is None:
            raise MechintError(f"{path} has no end: say how many texts, or give a file")
    elif not path.exists() and not any(sign in str(path) for sign in "*?["):
        raise MechintError(f"text file not found: {path}; it should hold one text a line")
    if path.is_file() and format_of(path) is None:
        source: TextSource = FileTexts(str(path), [path], text_field, 0, unit, plain=True)
    else:
        source = open_texts(path, text_field=text_field, unit=unit)
    documents = source.read(0, sys.maxsize if limit is None else limit)
    if not documents:
        raise MechintError(f"text file {path} is empty; it should hold one text a line")
    return documents


def iter_texts_from_path(path: str | os.PathLike) -> list[str]:
    """The strings of `documents_from`. Raises `MechintError` for chats and token ids, which need a model, too."""
    texts = []
    for content, where, _ in documents_from(path):
        if not isinstance(content, str):
            raise MechintError(f"{where} holds a chat or token ids, not a string")
        texts.append(content)
    return texts


def _no_revision(dataset: str, revision: str | None) -> None:
    if revision is not None:
        raise MechintError(f"--revision {revision}: only data sets on the Hub have revisions, {dataset} is local")
