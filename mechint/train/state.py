"""What a stopped run goes on from: weights, optimizer, step and dead-latent record in one file, replaced atomically."""

import dataclasses
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mechint.errors import MechintError, one_line
from mechint.provenance import atomic_path
from mechint.sae import SparseAutoEncoder


@dataclass
class TrainState:
    """Everything that the next step depends on, beside the config and the activations."""

    sae: SparseAutoEncoder
    optimizer: torch.optim.Optimizer
    ever_active: Bool[Tensor, " d_sae"]
    step: int = 0  # steps done
    training_seconds: float = 0.0
    metrics_size: int = 0  # bytes of metrics.csv when the state was saved; what comes behind will be written again
    resumed_at: list[int] = dataclasses.field(default_factory=list)


def save_state(state: TrainState, path: Path, *, config: dict[str, Any], activations_sha256: str) -> None:
    """Write the state and what it belongs to; a kill at any moment leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {
        "config": config,
        "step": state.step,
        "sae": state.sae.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "ever_active": state.ever_active,
        "training_seconds": state.training_seconds,
        "metrics_size": state.metrics_size,
        "resumed_at": state.resumed_at,
        "activations_sha256": activations_sha256,
    }
    # Through a file object: torch writes a path's name into the archive, and equal weights should be equal bytes.
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(values, file)


def load_state(state: TrainState, path: Path, *, config: dict[str, Any], activations_sha256: str) -> None:
    """Fill `state` from the file. Raises `MechintError` if it is missing, broken, or of another training."""
    try:
        values: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise MechintError(f"{path} not found: there is nothing to resume; start the run again") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise MechintError(f"{path} cannot be read ({one_line(error, 120)}): start the run again") from error
    if not isinstance(values, dict) or "metrics_size" not in values:
        raise MechintError(f"{path} is not the state of a training of this version: start the run again")
    if changed := [key for key, value in config.items() if values["config"].get(key) != value]:
        raise MechintError(
            f"{path} is the state of a stopped training with another {', '.join(changed)}: go on with the settings it"
            " had, or move it away"
        )
    if values["activations_sha256"] != activations_sha256:
        raise MechintError(
            f"{path} was trained on other activations (sha256 {values['activations_sha256'][:12]}, now"
            f" {activations_sha256[:12]}): restore them, or start a new run"
        )
    state.sae.load_state_dict(values["sae"])
    state.optimizer.load_state_dict(values["optimizer"])
    state.ever_active.copy_(values["ever_active"])
    state.step = values["step"]
    state.training_seconds = values["training_seconds"]
    state.metrics_size = values["metrics_size"]
    state.resumed_at = [*values["resumed_at"], state.step]
