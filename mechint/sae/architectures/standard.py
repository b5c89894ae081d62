"""The canonical SAE: separate encoder and decoder, ReLU, L1, decoder rows of unit norm.

    f     = ReLU((x - b_dec) @ W_enc + b_enc)
    x_hat = f @ W_dec + b_dec
    loss  = mean((x_hat - x)^2) + sparsity * mean(f)

Source of form and initialisation: reference pipeline "mech-int" (Pythia-70M, layer 3); the same architecture is
"standard" in SAELens and follows Bricken et al. 2023, "Towards Monosemanticity", section "Sparse Autoencoders".
With free decoder rows the penalty is mean(f * |W_dec row|): Anthropic, "Circuits Updates - April 2024".

An L1 pulls every active f down with the same force, however strong it is: activations come out too small. With
`saturation` s the penalty is mean(f / (1 + s f)), whose force 1 / (1 + s f)^2 is that of the L1 at f = 0 and fades for
strong f (Geman and McClure 1987's kind of penalty, on f instead of f^2). Architecture and saved form stay the same.
"""

import math
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.base import SAE, Loss, Objective, add_auxk, mean_squared_error, weighted_acts


@final
class SparseAutoEncoder(SAE):
    """ReLU SAE with `d_sae = expansion * activation_dim` latents (or any `d_sae` given by keyword)."""

    architecture = "standard"
    saved_tensors = ("W_enc", "b_enc", "W_dec", "b_dec")
    options = {"saturation": 0.0}
    has_l1 = True
    shardable = True
    latents_are_independent = True

    def __init__(
        self,
        activation_dim: int,
        expansion: int = 8,
        *,
        d_sae: int | None = None,
        saturation: float = 0.0,
        generator: torch.Generator | None = None,
    ):
        super().__init__(activation_dim, activation_dim * expansion if d_sae is None else d_sae, generator=generator)
        if not 0 <= saturation < math.inf:
            raise MechintError(f"--saturation must be 0 or above, got {saturation:g}")
        self.saturation = saturation

    @classmethod
    def make(cls, d_in: int, d_sae: int, **options: Any) -> "SparseAutoEncoder":
        return cls(d_in, d_sae=d_sae, **options)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(self.pre_activations(x))

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        x_hat, feature_acts = self(x)
        weighed = weighted_acts(self, feature_acts)
        if self.saturation:
            weighed = weighed / (1 + self.saturation * weighed)
        terms = {"mse": mean_squared_error(x, x_hat), "l1": self.peers.mean_latents(weighed)}
        loss = Loss(terms, {"mse": 1.0, "l1": objective.sparsity}, feature_acts)
        return add_auxk(loss, self, x, x_hat, objective)


def SAEloss(
    x: Float[Tensor, "*batch d_in"],
    x_hat: Float[Tensor, "*batch d_in"],
    feature_acts: Float[Tensor, "*batch d_sae"],
    lam: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """`(loss, mse, l1)` with `loss = mse + lam * l1`; both terms are means over all their elements.

    So `lam` equals a per-token-sum coefficient times `d_sae / d_in`: it is not comparable with that of tools which sum.
    The original pipeline's function, kept; training calls `SparseAutoEncoder.loss`, which is the same.
    """
    mse = (x_hat - x).pow(2).mean()
    l1 = feature_acts.abs().mean()
    return mse + lam * l1, mse, l1
