"""Where a training writes: a run directory, or the folders of the very first version (`train.py`)."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from mechint.config import SAETrainConfig
from mechint.errors import MechintError
from mechint.provenance import make_dir, read_json
from mechint.runs import Run, make_run_dir
from mechint.sae.checkpoint import metadata_path


@dataclass(frozen=True)
class Layout:
    """Paths of one training's files; `manifest` and `sae_dir` are None where the layout has none."""

    root: Path
    config: Path
    metrics: Path
    checkpoint: Path
    summary: Path
    state: Path
    manifest: Path | None
    sae_dir: Path | None
    metadata: Path | None  # what the SAE was trained on, beside a checkpoint that has no sae/ folder
    label: str  # the run_dir of summary.json and of what is printed

    def remove_state(self) -> None:
        """A finished run needs no state."""
        shutil.rmtree(self.state.parent, ignore_errors=True)


def run_layout(run_dir: Path) -> Layout:
    """The layout of docs/run.md."""
    return Layout(
        root=run_dir,
        config=run_dir / "config.json",
        metrics=run_dir / "metrics.csv",
        checkpoint=run_dir / "checkpoint.pt",
        summary=run_dir / "summary.json",
        state=run_dir / "state" / "state.pt",
        manifest=run_dir / "manifest.json",
        sae_dir=run_dir / "sae",
        metadata=None,
        label=str(run_dir),
    )


def legacy_layout(config: SAETrainConfig) -> Layout:
    """`saved_models/sae_model_{N}x.pt`, `training_metrics/...`, and config.json in the current folder; `{N}latents` in
    place of `{N}x` where d_in does not divide the width."""
    name = config.width_label.replace(" ", "")
    metrics = Path("training_metrics")
    return Layout(
        root=Path("."),
        config=Path("config.json"),
        metrics=metrics / f"training_metrics_{name}.csv",
        checkpoint=Path("saved_models") / f"sae_model_{name}.pt",
        summary=metrics / f"summary_{name}.json",
        state=metrics / f"state_{name}" / "state.pt",
        manifest=None,
        sae_dir=None,
        metadata=metadata_path(Path("saved_models") / f"sae_model_{name}.pt"),
        label="legacy",
    )


def make_layout(config: SAETrainConfig) -> Layout:
    """Make the directories of a new training; a model or somebody else's file is an error, never overwritten."""
    if not config.legacy_layout:
        return run_layout(make_run_dir(config.runs_root, config.run_name))
    layout = legacy_layout(config)
    if layout.checkpoint.exists():
        raise MechintError(
            f"{layout.checkpoint} exists and is not overwritten: move it away, or train into runs/ with"
            " scripts/train_sae.py"
        )
    if layout.config.exists():
        try:
            SAETrainConfig.from_dict(read_json(layout.config))
        except MechintError:
            raise MechintError(
                f"{layout.config.resolve()} exists and is not one of ours: run train.py in another folder"
            ) from None
    for path in (layout.checkpoint, layout.metrics):
        make_dir(path.parent)
    return layout


def layout_of(run: Run) -> Layout:
    """The layout of a run directory that exists."""
    return run_layout(run.path)
