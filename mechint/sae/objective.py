"""What a training step minimises: the weights in force, and the named terms that they weigh."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """What one step minimises beside the squared error: the weights in force at this step, and what is dead."""

    sparsity: float = 0.0  # weight of the architecture's own penalty, warm-up included
    dead: Bool[Tensor, " d_sae"] | None = None  # latents to revive; None where nothing is to be revived
    k_aux: int = 0  # dead latents a vector that AuxK reconstructs the residual with
    aux_coefficient: float = 0.0
    widths: tuple[int, ...] | None = None  # nested prefixes of this step (matryoshka); None: the SAE's own


@dataclass(frozen=True)
class Loss:
    """Named terms and their weights; the loss is the weighted sum. `mse` is always there."""

    terms: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    feature_acts: Float[Tensor, "batch d_sae"]

    @property
    def total(self) -> Float[Tensor, ""]:
        return weighted_sum(self.terms, self.weights)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Float[Tensor, ""]:
    """The loss from its terms, summed in the order in which the terms are named."""
    parts = [weights[name] * term for name, term in terms.items()]
    return torch.stack(parts).sum() if len(parts) > 2 else sum(parts[1:], start=parts[0])
