"""A sweep of ours as a repository of several checkpoints: its members, by L0 and FVU, in a format that others open.

FVU is the same quotient as NMSE: squared error over the variance of the activations.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mechint.config import DATASET_ALIASES
from mechint.config.publish_sweep import RepoSpec
from mechint.errors import MechintError, one_line
from mechint.hub.frontier import Candidate, flat, select_layers
from mechint.hub.metrics_source import Gathered
from mechint.hub.multi import Checkpoint, Repository, header_activation
from mechint.provenance import make_dir, scratch_folder, sha256_file
from mechint.runs import Run
from mechint.train.sweep_record import Sweep, open_sweep

# format -> the files that go up, the weights first
FILES = {"saelens": ("sae_weights.safetensors", "cfg.json"), "saev": ("sae.pt",)}


def choose_members(
    folder: Path, repo: str, *, max_per_layer: int, format: str, license: str, title: str | None = None
) -> Repository:
    """The repository of a sweep, with its choice made. Members that the format cannot hold are left out before.

    Raises:
        MechintError: no sweep there, members that are still training, or none that can be published.
    """
    sweep = open_sweep(folder)
    if sweep.unfinished:
        names = ", ".join(member.name for member in sweep.unfinished[:5])
        raise MechintError(
            f"{folder}: {len(sweep.unfinished)} of {len(sweep.members)} members are not finished ({names}); go on with"
            f" `{sweep.resume_command}`"
        )
    gathered = _gather(sweep, format)
    if not gathered.candidates:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(gathered.skipped.items())[:3])
        raise MechintError(f"{folder}: no member can be published as {format}: {why or 'it has none'}")
    config = sweep.members[0].config  # model, hook and texts are the same for all members
    model, hook = config.model_name or "a model that is not recorded", config.hook_name or "a hook"
    spec = RepoSpec(
        repo=repo,
        title=title or f"Sparse autoencoders of {model}: sweep {folder.resolve().name}",
        description=f"A sweep of sparse autoencoders on {hook} of {model}.",
        run_ids=tuple(candidate.run_id for candidate in gathered.candidates),
        base_model=config.model_source,
        datasets=(DATASET_ALIASES.get(config.dataset_name, config.dataset_name),) if config.dataset_name else (),
    )
    return Repository(spec, license, {}, gathered, select_layers(gathered.candidates, max_per_layer), format=format)


def _gather(sweep: Sweep, format: str) -> Gathered:
    found = Gathered([], {}, {})
    for member in sweep.members:
        if member.error is not None or member.status != "done":
            found.skipped[member.name] = f"failed: {one_line(member.error, 80)}"
            continue
        candidate = _candidate(member.name, member.path, member.config.layer, member.config.to_dict())
        if isinstance(candidate, str):
            found.skipped[member.name] = candidate
        elif format == "saev" and (reason := _unheld(member.path)):
            found.skipped[member.name] = reason
        else:
            found.candidates.append(candidate)
    return found


def _candidate(name: str, path: Path, layer: int | None, config: Mapping[str, Any]) -> Candidate | str:
    if layer is None:
        return "nothing says which layer its activations are of"
    summary = Run(path).summary
    for key in ("l0", "fvu"):
        value = summary.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return f"{key} is missing in summary.json, or no number"
    if summary["l0"] <= 0:
        return "nothing is ever active (L0 is 0)"
    activation = {key: config[key] for key in ("architecture", "k") if config.get(key) is not None}
    return Candidate(name, layer, float(summary["l0"]), float(summary["fvu"]), "", activation)


def _unheld(path: Path) -> str | None:
    """Why saev's format cannot hold a member; None if it can."""
    from mechint.formats.convert import find_format, held_variant, load

    try:
        held_variant(load(path)[1], find_format("saev", to=True))
    except MechintError as error:
        return str(error)
    return None


def convert_members(repository: Repository, sweep: Path, folder: Path, *, progress: bool = True) -> Repository:
    """Write the chosen members below `folder` as `layer_<N>/<name>/`, each proved to compute the same, and return the
    repository with them. Raises `MechintError` for a member that does not open, or no room."""
    from tqdm import tqdm

    from mechint.formats.convert import find_format, load, write_proved

    target = find_format(repository.format, to=True)
    found = []
    for candidate in tqdm(flat(repository.chosen), desc="converting", unit="SAE", disable=not progress):
        place = f"layer_{candidate.layer}/{candidate.run_id}"
        make_dir(folder / place)
        with scratch_folder(folder / place) as scratch:
            written = scratch / "sae"
            write_proved(load(sweep / candidate.run_id)[1], written, target)
            if repository.format == "saev":
                _name_commit(written / FILES["saev"][0], Run(sweep / candidate.run_id).manifest.get("git_commit"))
            for name in FILES[repository.format]:
                shutil.move(written / name, folder / place / name)
        files = {f"{place}/{name}": folder / place / name for name in FILES[repository.format]}
        weights = next(iter(files))
        activation = header_activation(files[weights]) if repository.format == "saev" else candidate.activation
        size = files[weights].stat().st_size
        found.append(Checkpoint(candidate, weights, files, activation, sha256_file(files[weights]), size))
    return replace(repository, checkpoints=found)


def _name_commit(path: Path, commit: Any) -> None:
    """Name the commit of the code that trained the SAE in a saev file, not that of the code that converted it: the same
    run is then the same bytes, whichever version publishes it."""
    header, _, archive = path.read_bytes().partition(b"\n")
    values = json.loads(header) | {"commit": str(commit or "unknown")}
    path.write_bytes(json.dumps(values, separators=(",", ":")).encode() + b"\n" + archive)
