"""Gated: whether a latent is active and how strongly are told apart, with one encoder matrix for both.

    u     = (x - b_dec) @ W_enc
    gate  = u + b_gate                   active where gate > 0
    mag   = u * exp(r_mag) + b_mag       how strongly
    f     = (gate > 0) * ReLU(mag)
    loss  = mean((x_hat - x)^2) + sparsity * mean(ReLU(gate)) + mean((ReLU(gate) @ W_dec* + b_dec* - x)^2)

The last term gives the gate its gradient; the decoder is a constant in it (*). Rajamanoharan et al. 2024, "Improving
Dictionary Learning with Gated Sparse Autoencoders", section 3.
"""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechint.sae.base import SAE, Loss, Objective, add_auxk, mean_squared_error, weighted_acts


@final
class GatedSAE(SAE):
    """Has `b_gate`, `b_mag` and `r_mag` (all `[d_sae]`, starting at 0) and no `b_enc`."""

    architecture = "gated"
    saved_tensors = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    has_l1 = True
    shardable = True
    latents_are_independent = True

    def __init__(self, d_in: int, d_sae: int, *, generator: torch.Generator | None = None):
        super().__init__(d_in, d_sae, generator=generator)
        del self.b_enc
        self.b_gate = nn.Parameter(torch.zeros(d_sae))
        self.b_mag = nn.Parameter(torch.zeros(d_sae))
        self.r_mag = nn.Parameter(torch.zeros(d_sae))

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Those of the gate: what decides whether a latent is active."""
        return self._unbiased(x) + self.b_gate

    def _unbiased(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        return (x - self.peers.shared(self.b_dec)) @ self.W_enc

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        u = self._unbiased(x)
        return (u + self.b_gate > 0) * torch.relu(u * self.r_mag.exp() + self.b_mag)

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        u = self._unbiased(x)
        gate = torch.relu(u + self.b_gate)
        feature_acts = (gate > 0) * torch.relu(u * self.r_mag.exp() + self.b_mag)
        x_hat = self.decode(feature_acts)
        by_gate = self.peers.sum_latents(gate @ self.W_dec.detach()) + self.b_dec.detach()
        terms = {
            "mse": mean_squared_error(x, x_hat),
            "l1": self.peers.mean_latents(weighted_acts(self, gate)),
            "gate_mse": mean_squared_error(x, by_gate),
        }
        loss = Loss(terms, {"mse": 1.0, "l1": objective.sparsity, "gate_mse": 1.0}, feature_acts)
        return add_auxk(loss, self, x, x_hat, objective)

    def latent_offsets(self) -> tuple[str, ...]:
        return ("b_gate", "b_mag")
