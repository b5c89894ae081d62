"""Repositories of several checkpoints: what is chosen, checked, laid out and described, up to the bundle.

    layer_<N>/<run-id>/sae.pt    the checkpoint, byte for byte
    README.md                    the table of checkpoints, and how to load one
    manifest.jsonl               the same for programs, a checkpoint a line

A file for `--repos` describes the repositories (`read_repositories`); their runs come from sweep files, the metrics
from `metrics_source`. `sweep_members` makes the same of a sweep of ours.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mechint.config.base import require
from mechint.config.publish_sweep import CollectionSpec, ReposFile, RepoSpec
from mechint.errors import MechintError, one_line
from mechint.hub.frontier import Candidate, flat, select_layers
from mechint.hub.metrics_source import CLASSES, Gathered, Record, activation_key, candidates
from mechint.hub.sweep_files import RUN_ID, read_run_ids
from mechint.provenance import read_json, sha256_file

# Longest first line of a checkpoint that is looked at (bytes).
MAX_HEADER = 1 << 20
# Faults that one message names; the others are counted.
SHOWN_FAULTS = 5


@dataclass(frozen=True)
class Checkpoint:
    """A chosen checkpoint, checked.

    Attributes:
        path: of its weights in the repository: `layer_23/abc123/sae.pt`.
        files: path in the repository -> local file; the weights and what else belongs to them.
        activation: how its activation function is configured, as its own file says it.
        sha256, size: of the weights, in bytes.
    """

    candidate: Candidate
    path: str
    files: dict[str, Path]
    activation: Mapping[str, Any]
    sha256: str
    size: int

    @property
    def folder(self) -> str:
        return self.path.rsplit("/", 1)[0]

    def manifest_row(self) -> dict[str, Any]:
        """Its line of manifest.jsonl."""
        chosen = self.candidate
        return {
            "run_id": chosen.run_id,
            "layer": chosen.layer,
            "l0": chosen.l0,
            "nmse": chosen.nmse,
            "activation": dict(self.activation),
            "sha256": self.sha256,
            "path": self.path,
            "size": self.size,
        }


@dataclass(frozen=True)
class Repository:
    """One repository and what was chosen for it.

    Attributes:
        chosen: layer -> candidates by rising L0.
        checkpoints: the same, checked, by layer and L0; empty before `preflight`.
        format: `saev`, or `saelens` for members of a sweep of ours.
    """

    spec: RepoSpec
    license: str
    links: Mapping[str, str]
    gathered: Gathered
    chosen: Mapping[int, Sequence[Candidate]]
    checkpoints: list[Checkpoint] = field(default_factory=list)
    format: str = "saev"


@dataclass(frozen=True)
class Repositories:
    """A file for --repos, read."""

    settings: ReposFile
    repos: tuple[RepoSpec, ...]
    links: dict[str, str]
    collections: tuple[CollectionSpec, ...]


# --- what is to be published ------------------------------------------------------------------------------------------


def read_repositories(path: Path) -> Repositories:
    """Read and check a file for --repos. Raises `MechintError` that names the entry and the key."""
    values = read_json(path, "file of repositories")
    repos = _objects(values.pop("repos", None), f"{path}: repos")
    collections = _objects(values.pop("collections", []), f"{path}: collections")
    links = values.pop("links", {})
    if not isinstance(links, dict) or not all(isinstance(link, str) for link in links.values()):
        raise MechintError(f"{path}: links should be an object of names and addresses")
    require(bool(repos), f"{path}: repos should list at least one repository")
    for entry in repos:
        require(isinstance(entry.get("repo"), str), f"{path}: each entry of repos needs `repo`, such as user/name")
    found = Repositories(
        ReposFile.from_dict(values, source=str(path)),
        tuple(RepoSpec.from_dict(entry, source=f"{path}: {entry['repo']}") for entry in repos),
        links,
        tuple(CollectionSpec.from_dict(entry, source=f"{path}: collections") for entry in collections),
    )
    ids = [spec.repo for spec in found.repos]
    require(len(set(ids)) == len(ids), f"{path}: two entries of repos name the same repository")
    return found


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise MechintError(f"{what} should be a list of objects")
    return value


def run_ids_of(spec: RepoSpec, sweeps_root: Path, pattern: str | None = None) -> list[str]:
    """The ids that a repository is chosen from: those it lists, and those of its sweep file."""
    ids = list(spec.run_ids)
    if spec.sweep_file:
        ids += read_run_ids(sweeps_root / spec.sweep_file, spec.tables, pattern=pattern or RUN_ID)
    for run_id in ids:
        # an id becomes a folder here and in the repository
        plain = run_id not in (".", "..") and not set(run_id) & set("/\\\0") and run_id == run_id.strip()
        require(plain and bool(run_id), f"{spec.repo}: run id {run_id!r} should be a plain name")
    return list(dict.fromkeys(ids))


def choose(
    spec: RepoSpec,
    run_ids: Sequence[str],
    records: Mapping[str, Record],
    *,
    max_per_layer: int,
    license: str,
    links: Mapping[str, str],
) -> Repository:
    """The repository with its choice made. Raises `MechintError` where nothing is left to choose from."""
    gathered = candidates(run_ids, records, objective=spec.objective, activation=spec.activation, layers=spec.layers)
    if not gathered.candidates:
        reasons = {reason: 0 for reason in (*gathered.filtered.values(), *gathered.skipped.values())}
        for reason in (*gathered.filtered.values(), *gathered.skipped.values()):
            reasons[reason] += 1
        why = "; ".join(f"{count} x {reason}" for reason, count in list(reasons.items())[:SHOWN_FAULTS])
        raise MechintError(
            f"{spec.repo}: none of {len(run_ids)} runs has objective {spec.objective}, activation {spec.activation} and"
            f" its metrics: {why or 'no run ids'}"
        )
    return Repository(spec, license, links, gathered, select_layers(gathered.candidates, max_per_layer))


def missing_layers(repository: Repository) -> list[int]:
    """Layers that the repository should have and for which no run is left."""
    return [layer for layer in repository.spec.layers if layer not in repository.chosen]


# --- preflight --------------------------------------------------------------------------------------------------------


def preflight(repository: Repository, runs_root: Path, checkpoint: str, *, progress: bool = True) -> Repository:
    """Load every chosen checkpoint, `runs_root/<run-id>/<checkpoint>`, and return the repository with them.

    Each must open with the reader of saev's format, be finite, have the widths of `spec` and the activation that its
    run records, and lie on the layer that its own config.json says, where there is one.

    Raises:
        MechintError: checkpoints that fail, each with its reason.
    """
    from tqdm import tqdm

    found: list[Checkpoint] = []
    faults: list[str] = []
    chosen = flat(repository.chosen)
    for candidate in tqdm(chosen, desc=f"checking {repository.spec.name}", unit="file", disable=not progress):
        try:
            found.append(_checked(candidate, runs_root / candidate.run_id, checkpoint, repository.spec))
        except MechintError as error:
            faults.append(f"{candidate.run_id}: {error}")
    refuse_faults(repository.spec.repo, faults, len(chosen))
    return replace(repository, checkpoints=found)


def refuse_faults(repo: str, faults: Sequence[str], n_chosen: int) -> None:
    """Raise `MechintError` if there are any faults, naming the first ones."""
    if faults:
        shown = "; ".join(one_line(fault, 160) for fault in faults[:SHOWN_FAULTS])
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise MechintError(f"{repo}: {len(faults)} of {n_chosen} checkpoints cannot be published: {shown}{more}")


def _checked(candidate: Candidate, run: Path, checkpoint: str, spec: RepoSpec) -> Checkpoint:
    from mechint.formats.saev import read

    source = (run / checkpoint).resolve()  # scratch file systems are full of links; what is read here is what goes up
    loaded = read(source)  # missing files, broken archives, wrong shapes and entries that are not finite end here
    for name, wanted, real in (("d_model", spec.d_model, loaded.d_in), ("d_sae", spec.d_sae, loaded.d_sae)):
        require(wanted in (None, real), f"{source} has {name} {real}, expected {wanted}")
    activation = header_activation(source)
    said, own = activation_key({"sae": {"activation": candidate.activation}}), activation_key_of(activation)
    for wanted in (said, None if spec.activation == "any" else spec.activation):
        require(wanted in (None, own), f"{source} has the activation {own}, its run says {wanted}")
    if (run / "config.json").is_file():
        config = read_json(run / "config.json", "run's config")
        layer = (config.get("val_data") or config.get("train_data") or {}).get("layer")
        require(layer in (None, candidate.layer), f"{run / 'config.json'} says layer {layer}, not {candidate.layer}")
    path = f"layer_{candidate.layer}/{candidate.run_id}/{Path(checkpoint).name}"
    return Checkpoint(candidate, path, {path: source}, activation, sha256_file(source), source.stat().st_size)


def header_activation(path: Path) -> dict[str, Any]:
    """The activation's configuration in the first line of a saev checkpoint that opened: `{"cls": ..., "params": ...}`.

    The oldest files have none, or one among their flat settings; it is named as the newer ones would.
    """
    with open(path, "rb") as file:
        header = json.loads(file.readline(MAX_HEADER))
    cfg = header["cfg"] if isinstance(header.get("cfg"), dict) else header
    if isinstance(cfg.get("activation"), dict):
        return cfg["activation"]
    name = header.get("cls", "Relu")
    params = {"key": CLASSES[name]} | ({"top_k": cfg["top_k"]} if "top_k" in cfg else {})
    return {"cls": name, "params": params}


def activation_key_of(activation: Mapping[str, Any]) -> str | None:
    return activation_key({"sae": {"activation": activation}})
