"""Imports of what is on this machine: finished runs and sweeps of the runs folder, and files that the operator allows.

The lists that requests need are made from names and JSON alone. The jobs copy, verify and ingest as a download does.
"""

import datetime
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from mechint.config import check_run_name, layer_of_hook
from mechint.errors import MechintError
from mechint.provenance import read_json, sha256_file
from mechint.server import storage
from mechint.server.errors import ServiceError
from mechint.server.ingest import DOWNLOADED, hook_type, ingest
from mechint.server.jobs import Running
from mechint.server.settings import Settings
from mechint.server.storage import inside

# What a finished run keeps of its training, and what others made from its SAE: of no use in the library.
LEFT_OUT = ("state", "exports", ".locks")
SWEEP_JSON, MANIFEST = "sweep.json", "manifest.json"


class Trained(NamedTuple):
    """One finished SAE of a run or sweep; `path` is relative to the runs folder."""

    path: str
    layer: int | None
    hook_name: str | None
    hook_type: str | None
    size_bytes: int


def training_not_found(training_id: str) -> ServiceError:
    return ServiceError(
        "training_not_found",
        f"Training not found: {training_id[:100]}",
        "give the name of a run or sweep in the server's runs folder",
        status=404,
    )


def trained(settings: Settings, training_id: str) -> list[Trained]:
    """The finished SAEs of a run (`train_abc123`), of a sweep, or of one member (`sweep/member`).

    Raises:
        ServiceError: Training not found.
    """
    parts = training_id.split("/")
    try:
        for part in parts:
            check_run_name(part)
        top, relative = inside(str(settings.runs_root.joinpath(*parts)), [settings.runs_root])
    except (MechintError, ValueError):
        raise training_not_found(training_id) from None
    folder = top / relative
    if len(parts) > 2 or not folder.is_dir():
        raise training_not_found(training_id)
    if (folder / SWEEP_JSON).is_file():
        members = read_json(folder / SWEEP_JSON, "sweep").get("members")
        names = [str(member.get("name")) for member in members or () if isinstance(member, dict)]
        places = [relative / name for name in names if "/" not in name and not name.startswith(".")]
    elif (folder / "config.json").is_file():
        places = [relative]
    else:
        raise training_not_found(training_id)
    found = [_trained(top, place) for place in places if (top / place / MANIFEST).is_file()]
    return sorted(found, key=lambda sae: (sae.layer if sae.layer is not None else -1, sae.path))


def _trained(top: Path, place: PurePosixPath) -> Trained:
    try:
        config = read_json(top / place / "config.json", "config file")
    except MechintError:
        config = {}
    hook = config.get("hook_name") or config.get("hook")
    hook = str(hook) if hook else None
    layer = layer_of_hook(hook) if hook else config.get("layer")
    size = sum(
        os.path.getsize(path)
        for path in (top / place).rglob("*")
        if path.is_file() and not path.is_symlink() and not left_out(PurePosixPath(path.relative_to(top / place)))
    )
    layer = layer if isinstance(layer, int) else None
    return Trained(str(place), layer, hook, hook_type(hook or ""), size)


def left_out(path: PurePosixPath) -> bool:
    return path.parts[0] in LEFT_OUT or path.name.startswith(".")


def run_import_training(running: Running) -> None:
    """The job `import_training`."""
    settings = running.settings
    path = running.params["path"]
    top, relative = inside(str(settings.runs_root / path), [settings.runs_root])
    staged = copy(running, top, relative)
    original = staged / "original"
    manifest = read_json(original / MANIFEST, "manifest")
    for name, recorded in sorted((manifest.get("outputs") or {}).items()):
        file = original / storage.relative_name(str(name))
        if not file.is_file() or sha256_file(file) != recorded:
            raise ServiceError(
                "run_changed",
                f"{path}/{name} is not what the run's manifest recorded",
                "train again, or restore the file",
                status=409,
            )
        running.check()
    source = {"training": path, "git_commit": manifest.get("git_commit")}
    more = facts(original, manifest) | {"run": path, "is_directory": True}
    ingest(running, staged, source=source, more=more)


def run_import_file(running: Running) -> None:
    """The job `import_file`."""
    path = running.params["file_path"]
    top, relative = inside(path, running.settings.import_roots)
    is_directory = (top / relative).is_dir()
    if not is_directory and relative.name in ("cfg.json", "sae_weights.safetensors", "sae.safetensors"):
        relative, is_directory = relative.parent, True  # a part of an SAE's folder
    staged = copy(running, top, relative)
    more = {"original_path": path, "is_directory": is_directory}
    ingest(running, staged, source={"file": PurePosixPath(path).name}, more=more)


def copy(running: Running, top: Path, relative: PurePosixPath) -> Path:
    """A staging folder with a copy of what lies there under `original`."""
    running.report("download", 0.0, "Copying", always=True)
    folder = top / relative
    mode = os.stat(folder, follow_symlinks=False).st_mode
    total = os.path.getsize(folder)
    if stat.S_ISDIR(mode):
        total = sum(
            path.stat(follow_symlinks=False).st_size
            for path in folder.rglob("*")
            if path.is_file() and not left_out(PurePosixPath(path.relative_to(folder)))
        )
    storage.check_room(running.settings, total, relative.name or "the folder")
    staged = storage.stage(running.settings, running.id, running.attempt, take_over=False)

    def progress(n_bytes: int, *, always: bool = False) -> None:
        done = DOWNLOADED * min(n_bytes / max(total, 1), 1.0)
        text = f"Copying: {done:.1f}%"
        running.report("download", done, text, bytes_done=n_bytes, bytes_total=total, always=always)

    limit = running.settings.max_sae_bytes
    copied = storage.copy_in(top, relative, staged / "original", limit=limit, skip=left_out, progress=progress)
    progress(copied, always=True)
    return staged


def facts(run: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What a run says of its training, under the API's names."""
    config = manifest.get("config") or {}
    summary = manifest.get("summary") or {}
    done = datetime.datetime.fromtimestamp((run / MANIFEST).stat().st_mtime, datetime.UTC)
    steps = config.get("epochs") or config.get("steps")
    dataset = config.get("dataset_name")
    return {
        "training_hyperparameters": config,
        "training_status": "completed",
        "training_summary": summary,
        "final_loss": summary.get("mse_per_dim"),
        "final_l0_sparsity": summary.get("l0"),
        "format_source": "mechint",
        "training_completed_at": done.isoformat(),
        "training_total_steps": steps,
        "training_steps_completed": steps,
        "training_dataset_names": [dataset] if dataset else [],
        "git_commit": manifest.get("git_commit"),
    }
