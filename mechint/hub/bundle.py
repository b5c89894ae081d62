"""What is published together: a name, a kind, the files under the names they get in the repository."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

README, METADATA = "README.md", "bundle_metadata.json"


class StagedFile(NamedTuple):
    """One file as it goes up: `sha256` and `size` (bytes) are of the staged content, after scrubbing."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Bundle:
    """Everything that goes up in one commit, before the generated files.

    README.md and bundle_metadata.json are generated when the bundle is staged and must not be among `files`.
    """

    kind: str  # "sae", "steering", "investigation", "checkpoints"
    name: str  # shown in the panel and in the commit message, e.g. "sae-run51-gpt2-medium"
    files: Mapping[str, Path | bytes]  # POSIX path in the repository -> a local file, or content made in memory
    license: str  # as the user said it ("research-only"); goes into bundle_metadata.json unchanged
    # README.md of this bundle in repository `repo_id`: card(repo_id, {path in the repository: StagedFile}).
    # Must be the same text each time for the same arguments (no dates of now), else every publish makes a commit.
    card: Callable[[str, Mapping[str, StagedFile]], str]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # the kind's own keys of bundle_metadata.json
    # After the upload `check_files` are downloaded from the new commit into a fresh cache (their hashes are compared)
    # and `check` gets the folder that holds them under their names here; it raises MechintError if what it loads there
    # does not compute the same as the local one. Without check_files, one file is downloaded and its hash compared.
    check: Callable[[Path], None] | None = None
    check_files: tuple[str, ...] = ()
    # Folders of this machine whose absolute path may occur in text files; it is cut away there ("/x/runs/a/sae" with
    # root /x/runs/a becomes "sae"). The current folder and the home folder are always scrubbed.
    roots: tuple[Path, ...] = ()
