"""What a training step takes and gives, whichever kernel computes it."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from mechint.sae import Objective


@dataclass(frozen=True)
class StepSettings:
    """What may differ from step to step."""

    lr: float
    max_grad_norm: float
    objective: Objective


class Pass(NamedTuple):
    """What a batch showed, before any update; its gradients are in the parameters' `.grad`."""

    terms: dict[str, Float[Tensor, ""]]  # "loss" (the weighted sum), "mse" and the other terms, unweighted
    n_active: Int[Tensor, ""]  # feature_acts that are not 0, in the whole batch
    fire_counts: Int[Tensor, " d_sae"]  # vectors of the batch on which each latent is above 0


class StepResult(NamedTuple):
    """A pass and the total gradient norm before clipping (NaN where the loss was not finite: then nothing moved)."""

    terms: dict[str, Float[Tensor, ""]]
    n_active: Int[Tensor, ""]
    fire_counts: Int[Tensor, " d_sae"]
    grad_norm: Float[Tensor, ""]


@runtime_checkable
class Kernel(Protocol):
    """A way to compute training steps of one SAE with one Adam. All ways agree with `DenseKernel` to float32 rounding.

    State that outlives a step is in the SAE and in the optimizer alone, so kernels can be changed within a run.
    """

    name: str

    def backward(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Pass:
        """Loss and gradients; processes that share a batch average the gradients between this and `update`."""
        ...

    def update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        """Project if asked, clip by total norm, Adam, constraints. Returns the norm before clipping."""
        ...

    def step(self, x: Float[Tensor, "batch d_in"], settings: StepSettings) -> StepResult:
        """`backward`, then `update` unless the loss is not finite."""
        ...
