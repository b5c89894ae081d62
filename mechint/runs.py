"""The run directory as an object. `docs/run.md` is the contract; every command takes the directory and finds the rest.

config.json     what was asked            state/     what a stopped run goes on from (gone when it is done)
metrics.csv     the training curve        sae/       the weights in SAELens's layout, with what they were trained on
checkpoint.pt   the weights               manifest.json  what was used: versions, device, hashes of input and output
summary.json    what came out
"""

import functools
import os
from pathlib import Path
from typing import Any, final

from mechint.config import SAETrainConfig, check_run_name
from mechint.errors import MechintError
from mechint.provenance import (
    get_git_commit,
    make_dir,
    package_versions,
    read_json,
    sha256_file,
    timestamp_slug,
    write_json,
)

# What the manifest hashes of the run itself; `sae/` holds the same weights once more, in another layout.
HASHED_FILES = (
    "config.json",
    "metrics.csv",
    "checkpoint.pt",
    "summary.json",
    "sae/cfg.json",
    "sae/sae_weights.safetensors",
)
MANIFEST_VERSION = 1


def make_run_dir(runs_root: str | Path, run_name: str | None = None) -> Path:
    """Make and return a new directory `runs_root/run_name`; an existing name gets -1, -2, ... appended.

    The name defaults to the date and time. Raises `MechintError` for a name that is not one plain folder name.
    """
    name = run_name or timestamp_slug()
    check_run_name(name)
    root = Path(runs_root)
    make_dir(root)
    path, number = root / name, 0
    while True:
        try:
            # mkdir is what decides, not a look beforehand: two runs started at once get two directories.
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = root / f"{name}-{number}"
        except OSError as error:
            raise MechintError(f"run directory {path} cannot be made ({error.strerror}): give another place") from error


@final
class Run:
    """A run directory. Opening one that has no config.json raises `MechintError`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            beside = sorted(p.name for p in self.path.parent.glob("*/config.json"))
            raise MechintError(
                f"run directory not found: {self.path}" + (f"; {len(beside)} runs lie beside it" if beside else "")
            )
        if not self.config_path.is_file():
            raise MechintError(f"{self.path} has no config.json: not a run directory; train_sae.py makes one")

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {'done' if self.is_done else 'not finished'})"

    config_path = property(lambda self: self.path / "config.json")
    metrics_path = property(lambda self: self.path / "metrics.csv")
    summary_path = property(lambda self: self.path / "summary.json")
    manifest_path = property(lambda self: self.path / "manifest.json")
    state_path = property(lambda self: self.path / "state" / "state.pt")
    sae_dir = property(lambda self: self.path / "sae")

    @property
    def is_done(self) -> bool:
        """The manifest is written last."""
        return self.manifest_path.is_file()

    @property
    def checkpoint_path(self) -> Path:
        """Path of checkpoint.pt. Raises `MechintError` while the run is not finished."""
        path = self.path / "checkpoint.pt"
        if not path.is_file():
            raise MechintError(
                f"{self.path} has no checkpoint.pt: its training is not finished; go on with"
                f" `python scripts/train_sae.py --resume {self.path}`"
            )
        return path

    @functools.cached_property
    def config(self) -> SAETrainConfig:
        return SAETrainConfig.from_json(self.config_path)

    @property
    def summary(self) -> dict[str, Any]:
        return read_json(self.summary_path, "summary")

    @property
    def manifest(self) -> dict[str, Any]:
        return read_json(self.manifest_path, "manifest")

    def activations_path(self) -> Path:
        """Where the activations lie that the run was trained on.

        As the manifest places them relative to the run, else as config.json says, relative to the current folder.
        Raises `MechintError` if they are in neither place.
        """
        places = [Path(self.config.activations_path)]
        if self.config.live is not None:  # the held-out rows, wherever the run has gone since
            places.insert(0, self.path / places[0].name)
        if self.is_done and (recorded := self.manifest.get("inputs", {}).get("activations", {}).get("path")):
            places.insert(0, self.path / recorded)
        for place in places:
            if place.exists():
                return Path(os.path.normpath(place))
        raise MechintError(
            f"the activations of {self.path} are not at {' or '.join(map(str, places))}: give --activations-path, or"
            " collect them again"
        )


def latest_run(runs_root: str | Path | None = None, *, prefer: str = "ablation.csv") -> Run:
    """The newest finished run of `runs_root` that holds the file `prefer`; if none does, the newest finished one.

    Without `runs_root`, the first folder `runs/` that holds a finished run is taken: of the current folder, of those
    around it, of the checkout that this package runs from. So it does not matter where a notebook is started.

    Raises:
        MechintError: there is no finished run.
    """
    if runs_root is not None:
        roots = [Path(runs_root)]
    else:
        here = Path.cwd()
        roots = [folder / "runs" for folder in (here, *here.parents, Path(__file__).resolve().parent.parent)]
    for root in roots:
        runs = [Run(path.parent) for path in root.glob("*/manifest.json") if (path.parent / "config.json").is_file()]
        if runs:
            return max(runs, key=lambda run: ((run.path / prefer).is_file(), run.manifest_path.stat().st_mtime))
    looked = (
        f"in {roots[0]}" if runs_root is not None else "in runs/ of this folder, of those around it, or of the checkout"
    )
    raise MechintError(f"no finished run {looked}: `make pipeline` makes one on the built-in world, in minutes")


def write_run_manifest(run_dir: str | Path, manifest: dict[str, Any]) -> Path:
    """Write manifest.json as it is given; `write_manifest` makes one. Returns its path."""
    path = Path(run_dir) / "manifest.json"
    write_json(path, manifest)
    return path


def write_manifest(
    run_dir: str | Path, config: Any, summary: dict[str, Any], *, inputs: dict[str, Any] | None = None, **extra: Any
) -> Path:
    """Write manifest.json: config, summary and commit as the original had them, and the hash chain.

    `inputs` describes what was read (for activations: path relative to the run, sha256, and the hashes that their own
    record holds of texts and model). The hashes of the run's own files are taken here.
    """
    run_dir = Path(run_dir)
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "checkpoint_path": "checkpoint.pt",
        "config": config if isinstance(config, dict) else config.to_dict(),
        "summary": summary,
        "git_commit": get_git_commit(),
        "versions": package_versions(),
        "inputs": inputs or {},
        "outputs": {name: sha256_file(run_dir / name) for name in HASHED_FILES if (run_dir / name).is_file()},
        **extra,
    }
    return write_run_manifest(run_dir, manifest)


def verify(run: Run) -> list[tuple[str, str]]:
    """Check a finished run against its manifest: `(what, verdict)` for each link of the chain.

    A verdict is "ok", "changed", "missing" or "not recorded". The activations are hashed from their bytes, and what
    their own record says of texts and model is compared with what the manifest noted when training began.
    """
    from mechint.data.store import open_activations

    manifest = run.manifest
    found: list[tuple[str, str]] = []
    for name, recorded in sorted(manifest.get("outputs", {}).items()):
        path = run.path / name
        verdict = "missing" if not path.is_file() else "ok" if sha256_file(path) == recorded else "changed"
        found.append((name, verdict))
    recorded_inputs = manifest.get("inputs", {}).get("activations", {})
    if not recorded_inputs.get("sha256"):
        return [*found, ("activations", "not recorded")]
    try:
        place = run.activations_path()
    except MechintError:
        return [*found, ("activations", "missing")]
    try:
        activations = open_activations(place)
        activations.verify()  # the bytes against the activations' own record; a bare .pt has none and is hashed below
        found.append((f"activations {place}", "ok" if activations.sha256 == recorded_inputs["sha256"] else "changed"))
    except MechintError as error:
        return [*found, (f"activations {place}: {error}", "changed")]
    for key in ("texts_sha256", "model_sha256"):
        if recorded_inputs.get(key) is None:
            found.append((key, "not recorded"))
        else:
            found.append((key, "ok" if activations.info.get(key) == recorded_inputs[key] else "changed"))
    return found
