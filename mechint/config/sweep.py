"""Settings of `sweep.py`: the values that vary, and where all other settings come from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from mechint.config.base import Config, check_run_name, require
from mechint.config.presets import TRAIN_PRESETS, preset_values
from mechint.config.train import Preset, SAETrainConfig
from mechint.errors import MechintError, nearest

# What a grid may vary: fields of SAETrainConfig, in the order in which they name a member.
AXES = ("architecture", "expansion", "d_sae", "l1_lambda", "target_l0", "k", "learning_rate", "seed")


@dataclass(frozen=True)
class SweepConfig(Config):
    """Train one SAE for each combination of the values given, over one reading of the activations.

    --architecture, --expansion, --d-sae, --lam, --target-l0, --k, --learning-rate and --seed take several values each;
    what does not apply to an architecture (--k to standard, --lam to topk) is left out there. --expansion and --d-sae
    are one axis: given both, all their widths are trained. All other settings are those of train: from --config,
    --preset and --set.
    """

    activations_path: str | None = None
    """What to train on: a store folder, or a .pt tensor; that of --config if not given."""
    architecture: tuple[str, ...] | None = None
    """Architectures, as in train."""
    expansion: tuple[int, ...] | None = None
    """Latents per input dimension."""
    d_sae: tuple[int, ...] | None = None
    """Numbers of latents; need not be multiples of d_in."""
    l1_lambda: Annotated[tuple[float, ...] | None, arg(aliases=["--lam"])] = None
    """Weights of the sparsity penalty, for the architectures that have one."""
    target_l0: tuple[float, ...] | None = None
    """L0s to reach by steering that weight, for the same."""
    k: tuple[float, ...] | None = None
    """Active latents a vector, for topk, batchtopk and matryoshka_batchtopk."""
    learning_rate: Annotated[tuple[float, ...] | None, arg(aliases=["--lr"])] = None
    """Peak learning rates."""
    seed: tuple[int, ...] | None = None
    """Seeds of initial weights, split and batches; members with one seed see the same batches."""
    epochs: Annotated[int | None, arg(aliases=["--steps"])] = None
    """Optimiser steps of each member."""
    preset: Preset = "none"
    """Named settings, as in train."""
    config: Path | None = None
    """JSON file with settings of train, such as the config.json of a run."""
    settings: Annotated[tuple[str, ...], arg(aliases=["--set"])] = ()
    """Any other setting of train, as NAME=VALUE: --set batch_size=1024 warmup_steps=5%."""
    name: Annotated[str | None, arg(aliases=["--run-name"])] = None
    """Name of the sweep's folder, which holds a run directory for each member; the date and time if not given."""
    runs_root: str = "runs"
    """Folder that the sweep's folder is made in."""
    eval_texts: int = 100
    """Held-out texts for the cross-entropy of each member at the end; 0 leaves it out."""
    device: str | None = None
    """cuda, mps or cpu; the best that works if not given."""
    resume: Path | None = None
    """Go on with all members of this sweep that are not finished. Settings come from the sweep."""
    slurm: bool = False
    """Deal the members to jobs of a SLURM cluster (needs submitit) instead of training here."""
    slurm_jobs: int = 1
    """Jobs that share the members."""
    slurm_partition: str | None = None
    """Partition that the jobs ask for."""
    slurm_time: int = 240
    """Minutes that each job asks for; a job that is cut off before its end is queued again and goes on."""
    slurm_gpus: int = 0
    """GPUs that each job asks for."""
    slurm_cpus: int = 4
    """CPU cores that each job asks for."""

    @classmethod
    def aliases(cls) -> dict[str, str]:
        return {"steps": "epochs", "lam": "l1_lambda", "lr": "learning_rate", "run_name": "name", "set": "settings"}

    def __post_init__(self) -> None:
        for axis in AXES:
            values = getattr(self, axis)
            require(values is None or len(values) > 0, f"{flag_of(axis)} names no value: that is a grid of no members")
        require(self.eval_texts >= 0, f"--eval-texts must not be negative, got {self.eval_texts}")
        for name in ("slurm_jobs", "slurm_time", "slurm_cpus"):
            value = getattr(self, name)
            require(value > 0, f"--{name.replace('_', '-')} must be at least 1, got {value}")
        require(self.slurm_gpus >= 0, f"--slurm-gpus must not be negative, got {self.slurm_gpus}")
        for word in self.settings:
            require("=" in word, f"--set takes NAME=VALUE, got {word!r}")
        if self.name is not None:
            check_run_name(self.name)

    @property
    def grid(self) -> dict[str, list[Any]]:
        """The axes that were given, with their values, each value once."""
        return {axis: list(dict.fromkeys(getattr(self, axis))) for axis in AXES if getattr(self, axis) is not None}

    def base_settings(self, file: dict[str, Any]) -> dict[str, Any]:
        """Settings of train under every member: `file`, then the preset, then --set and the flags above."""
        preset = {} if self.preset == "none" else {"preset": self.preset, **TRAIN_PRESETS[self.preset]}
        base = SAETrainConfig.from_dict({**file, **preset}, source=str(self.config or "settings")).to_dict()
        given = {"activations_path": self.activations_path, "epochs": self.epochs, "device": self.device}
        given = self._set() | {name: value for name, value in given.items() if value is not None}
        return base | dict.fromkeys(SAETrainConfig.superseded(given, base)) | given

    def preset_for(self, architecture: str) -> dict[str, Any]:
        """What the preset says for the members of an architecture, without what --set says."""
        if self.preset == "none":
            return {}
        given = {"architecture", *self._set()}
        return {k: v for k, v in preset_values(self.preset, architecture).items() if k not in given}

    def _set(self) -> dict[str, Any]:
        """--set, by the name of the field."""
        found: dict[str, Any] = {}
        names, aliases = SAETrainConfig.field_names(), SAETrainConfig.aliases()
        for word in self.settings:
            name, _, value = word.partition("=")
            name = name.strip("-").replace("-", "_")
            name = aliases.get(name, name)
            if name not in names:
                raise MechintError(f"--set: train has no setting {name!r}; {nearest(name, names)}")
            if name in (*AXES, "preset", "run_name", "runs_root", "legacy_layout"):
                raise MechintError(
                    f"--set {name}: a sweep has a flag of its own for that, or chooses it for each member"
                )
            found[name] = _value(value)
        return found


def flag_of(axis: str) -> str:
    """The flag of an axis, for an error."""
    return {"l1_lambda": "--lam"}.get(axis, f"--{axis.replace('_', '-')}")


def _value(text: str) -> Any:
    """A value as JSON has it; anything else is text."""
    import json

    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
