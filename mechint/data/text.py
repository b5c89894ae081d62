"""Where texts come from: local files, the built-in tales, or a data set on the Hugging Face Hub.

A text is named by its number in the source, counted after blank texts are dropped. Every source reads forward from a
given number, so a collection that was killed goes on at the next text.
"""

import os
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mechint.data.local_text import OTHER_SOURCES, FileTexts, TaleTexts, local_files, txt_lines
from mechint.errors import MechintError, nearest

BUILTIN = ("builtin/tales",)


@runtime_checkable
class TextSource(Protocol):
    """Texts with the numbers `start`, `start + 1`, ... in order.

    `by_rank` says that the source itself gives each process its own texts (numbered from 0 in each); otherwise every
    process sees all of them.
    """

    by_rank: bool

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


def iter_texts_from_path(path: str | os.PathLike) -> list[str]:
    """The lines of a UTF-8 text file, stripped, blank ones dropped. Raises `MechintError` if there is none."""
    path = Path(path)
    if not path.is_file():
        raise MechintError(f"text file not found: {path}; it should hold one text a line")
    texts = [line.strip() for line in txt_lines(path) if line.strip()]
    if not texts:
        raise MechintError(f"text file {path} is empty; it should hold one text a line")
    return texts


def _no_revision(dataset: str, revision: str | None) -> None:
    if revision is not None:
        raise MechintError(f"--revision {revision}: only data sets on the Hub have revisions, {dataset} is local")
