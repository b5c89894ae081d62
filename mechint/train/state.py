"""What a stopped run goes on from: weights, optimizer, step and dead-latent record in one file, replaced atomically.

The state before the newest is kept beside it: if the newest cannot be read, the run goes on from the one before.
"""

import dataclasses
import os
import pickle
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechint.config import SAETrainConfig
from mechint.errors import MechintError, one_line
from mechint.provenance import atomic_path
from mechint.sae import SAE
from mechint.train.l0 import Steering


@dataclass
class TrainState:
    """Everything that the next step depends on, beside the config and the activations."""

    sae: SAE
    optimizer: torch.optim.Optimizer
    last_fired: Int[Tensor, " d_sae"]  # step at which each latent was last active, -1 for never
    input_scale: float = 1.0
    steering: Steering = dataclasses.field(default_factory=Steering)
    source: dict[str, Any] | None = None  # position of a live source of rows
    variance: float | None = None  # of the rows, a dimension; what the log's fvu is relative to
    step: int = 0  # steps done
    training_seconds: float = 0.0
    metrics_size: int = 0  # bytes of metrics.csv when the state was saved; what comes behind will be written again
    resumed_at: list[int] = dataclasses.field(default_factory=list)


# What is no tensor, and the same in every process.
PLAIN_FIELDS = tuple(
    field.name for field in dataclasses.fields(TrainState) if field.name not in ("sae", "optimizer", "last_fired")
)


def previous_path(path: Path) -> Path:
    """Where the state before the newest lies."""
    return path.with_name("state-before.pt")


def save_state(state: TrainState, path: Path, *, config: dict[str, Any], activations_sha256: str) -> None:
    """Write the state and what it belongs to; a kill at any moment leaves one that can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "config": config,
        "step": state.step,
        "sae": state.sae.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "last_fired": state.last_fired,
        "input_scale": state.input_scale,
        "steering": dataclasses.asdict(state.steering),
        "source": state.source,
        "variance": state.variance,
        "training_seconds": state.training_seconds,
        "metrics_size": state.metrics_size,
        "resumed_at": state.resumed_at,
        "activations_sha256": activations_sha256,
    }
    # Through a file object: torch writes a path's name into the archive, and equal weights should be equal bytes.
    with atomic_path(path) as temporary:
        with open(temporary, "wb") as file:
            torch.save(values, file)
        if path.is_file():
            os.replace(path, previous_path(path))


def has_state(path: Path) -> bool:
    """Whether there is a state to go on from, the newest or the one before."""
    return path.is_file() or previous_path(path).is_file()


def load_state(state: TrainState, path: Path, *, config: dict[str, Any], activations_sha256: str) -> None:
    """Fill `state` from the file, or from the one before it if it is cut short.

    Raises:
        MechintError: both are missing or broken, or they belong to another training (which setting differs is said).
    """
    values = _read_newest(path)
    saved = SAETrainConfig.from_dict(values["config"], source=str(path)).to_dict()
    if changed := [key for key, value in config.items() if saved[key] != value]:
        was = "; ".join(f"{key} was {saved[key]!r}, is {config[key]!r}" for key in changed[:3])
        raise MechintError(
            f"{path} is the state of a stopped training with another {', '.join(changed)} ({was}): go on with the"
            " settings it had, or move it away"
        )
    if values["activations_sha256"] != activations_sha256:
        raise MechintError(
            f"{path} was trained on other activations (sha256 {values['activations_sha256'][:12]}, now"
            f" {activations_sha256[:12]}): restore them, or start a new run"
        )
    if newer := [f"{key} {saved[key]!r}" for key in config if key not in values["config"]]:
        warnings.warn(
            f"{path} is of an earlier version, which did not have these settings yet: {', '.join(newer)}", stacklevel=2
        )
    state.sae.load_state_dict(values["sae"])
    state.optimizer.load_state_dict(values["optimizer"])
    state.last_fired.copy_(values["last_fired"])
    state.input_scale = values["input_scale"]
    state.steering = Steering(**values.get("steering", {}))  # earlier versions steered nothing
    state.source = values.get("source")
    state.variance = values.get("variance")
    state.step = values["step"]
    state.training_seconds = values["training_seconds"]
    state.metrics_size = values["metrics_size"]
    state.resumed_at = [*values["resumed_at"], state.step]


def _read_newest(path: Path) -> dict[str, Any]:
    broken: list[str] = []
    for place in (path, previous_path(path)):
        try:
            values = torch.load(place, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
            broken.append(f"{place} cannot be read ({one_line(error, 120)})")
            continue
        if not isinstance(values, dict) or "last_fired" not in values:
            broken.append(f"{place} is not the state of a training of this version")
            continue
        if broken:
            warnings.warn(f"{broken[0]}: going on from the state before it, step {values['step']}", stacklevel=3)
        return values
    if broken:
        raise MechintError(f"{'; '.join(broken)}: start the run again")
    raise MechintError(f"{path} not found: there is nothing to resume; start the run again")
