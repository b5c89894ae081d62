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

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.base import SAE
from mechint.sae.losses import add_auxk, mean_squared_error, weighted_acts
from mechint.sae.objective import Loss, Objective


class StandardSAE(SAE):
    """ReLU. `mechint.sae.legacy` has its form for old code."""

    architecture = "standard"
    saved_tensors = ("W_enc", "b_enc", "W_dec", "b_dec")
    options = {"saturation": 0.0}
    has_l1 = True
    shardable = True
    saturation: float
    latents_are_independent = True

    def check_options(self) -> None:
        if not 0 <= self.saturation < math.inf:
            raise MechintError(f"--saturation must be 0 or above, got {self.saturation:g}")

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(pre)

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        x_hat, feature_acts = self.run(x)
        weighed = weighted_acts(self, feature_acts)
        if self.saturation:
            weighed = weighed / (1 + self.saturation * weighed)
        terms = {"mse": mean_squared_error(x, x_hat), "l1": self.peers.mean_latents(weighed)}
        loss = Loss(terms, {"mse": 1.0, "l1": objective.sparsity}, feature_acts)
        return add_auxk(loss, self, x, x_hat, objective)
