"""What a format of files is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mechint.sae.base import SAE


@dataclass(frozen=True)
class Format:
    """One way of laying out an SAE in files.

    Attributes:
        name: what `--to` and `--from` call it.
        title: whose format it is, in words.
        marks: what its files look like, in words.
        sniff: whether a path looks like it, from names, first bytes and JSON keys alone; never raises for odd files.
        read: the SAE in the files at a path.
        write: an SAE into a new folder or file; raises `MechintError` for what it cannot hold.
        holds: None if the format can hold exactly this SAE, else why not, in a phrase.
        file_name: the usual name of its one file; empty where it is a folder.
        suffixes: of a destination that is meant as a file, beside that of `file_name`.
    """

    name: str
    title: str
    marks: str
    sniff: Callable[[Path], bool]
    read: Callable[[Path], SAE] | None
    write: Callable[[SAE, Path], None] | None
    holds: Callable[[SAE], str | None]
    file_name: str = ""
    suffixes: tuple[str, ...] = ()

    def is_file(self, path: Path) -> bool:
        """Whether a destination is meant as the one file of this format, not as a folder."""
        return path.suffix in (*self.suffixes, *([Path(self.file_name).suffix] if self.file_name else []))
