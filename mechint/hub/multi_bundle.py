"""What goes up of a repository of several checkpoints, and what a dry run writes of it."""

import json
from collections.abc import Mapping
from pathlib import Path

from mechint.errors import MechintError
from mechint.hub.bundle import README, Bundle, StagedFile
from mechint.hub.multi import Repository
from mechint.hub.multi_card import readme, selection_figure
from mechint.provenance import make_dir, write_text

MANIFEST = "manifest.jsonl"
FIGURE = "selection.png"
KIND = "checkpoints"


def manifest_text(repository: Repository) -> str:
    """manifest.jsonl."""
    return "".join(json.dumps(checkpoint.manifest_row()) + "\n" for checkpoint in repository.checkpoints)


def write_preview(repository: Repository, folder: Path) -> None:
    """Write README.md, manifest.jsonl and the figure of the choice into `folder`, to be looked at."""
    from mechint.report.style import save_figure

    make_dir(folder)
    write_text(folder / README, readme(repository))
    write_text(folder / MANIFEST, manifest_text(repository))
    figure = selection_figure(repository.gathered.candidates, repository.chosen, title=repository.spec.name)
    save_figure(figure, folder / FIGURE)


def bundle_of(repository: Repository) -> Bundle:
    """What is published: the checkpoints with README.md and manifest.jsonl.

    Its card refuses checkpoints that changed since they were checked; its check loads one that was downloaded and
    compares it with the local file on probe vectors.
    """
    files: dict[str, Path | bytes] = {}
    for checkpoint in repository.checkpoints:
        files |= checkpoint.files
    files[MANIFEST] = manifest_text(repository).encode()

    def card(repo_id: str, staged: Mapping[str, StagedFile]) -> str:
        for checkpoint in repository.checkpoints:
            if checkpoint.path in staged and staged[checkpoint.path].sha256 != checkpoint.sha256:
                changed = checkpoint.files[checkpoint.path]
                raise MechintError(f"{changed} changed while it was staged: run the command again")
        return readme(repository, repo_id)

    shown = repository.checkpoints[-1]
    place = shown.path if repository.format == "saev" else shown.folder

    def check(folder: Path) -> None:
        from mechint.formats.certificate import certify
        from mechint.formats.convert import load

        local = shown.files[shown.path]
        before = load(local if repository.format == "saev" else local.parent)[1]
        if not certify(before, load(folder / place)[1]).holds:
            raise MechintError(f"{shown.path} computes something else after the download")

    layers = sorted(repository.chosen)
    return Bundle(
        kind=KIND,
        name=repository.spec.name,
        files=files,
        license=repository.license,
        card=card,
        metadata={"format": repository.format, "layers": layers, "n_checkpoints": len(repository.checkpoints)},
        check=check,
        check_files=tuple(shown.files),
    )
