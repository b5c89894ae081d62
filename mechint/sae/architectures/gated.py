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

from mechint.sae.base import SAE
from mechint.sae.losses import add_auxk, mean_squared_error, weighted_acts
from mechint.sae.objective import Loss, Objective


@final
class GatedSAE(SAE):
    """Has `b_gate`, `b_mag` and `r_mag` (all `[d_sae]`, starting at 0) and no `b_enc`."""

    architecture = "gated"
    saved_tensors = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")
    latent_vectors = {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}
    has_l1 = True
    shardable = True
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter
    latents_are_independent = True

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """Those of the gate: what decides whether a latent is active."""
        return self.process_sae_in(x) @ self.W_enc + self.b_gate

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """`hook_sae_acts_pre` holds the magnitudes before their ReLU, as in SAELens."""
        gate, magnitude = self._gate_and_magnitude(x)
        return self.hook_sae_acts_post(gated(gate, self.hook_sae_acts_pre(magnitude)))

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return gated(pre, self._magnitude(pre - self.b_gate))

    def _gate_and_magnitude(self, x: Float[Tensor, "... d_in"]) -> tuple[Tensor, Tensor]:
        u = self.process_sae_in(x) @ self.W_enc
        return u + self.b_gate, self._magnitude(u)

    def _magnitude(self, u: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return u * self.r_mag.exp() + self.b_mag

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        gate, magnitude = self._gate_and_magnitude(x)
        gate = torch.relu(gate)
        feature_acts = gated(gate, magnitude)
        x_hat = self.decode(feature_acts)
        by_gate = self.peers.sum_latents(gate @ self.W_dec.detach()) + self.b_dec.detach()
        terms = {
            "mse": mean_squared_error(x, x_hat),
            "l1": self.peers.mean_latents(weighted_acts(self, gate)),
            "gate_mse": mean_squared_error(x, by_gate),
        }
        loss = Loss(terms, {"mse": 1.0, "l1": objective.sparsity, "gate_mse": 1.0}, feature_acts)
        return add_auxk(loss, self, x, x_hat, objective)

    @classmethod
    def latent_offsets(cls) -> tuple[str, ...]:
        return ("b_gate", "b_mag")


def gated(
    gate: Float[Tensor, "*batch d_sae"], magnitude: Float[Tensor, "*batch d_sae"]
) -> Float[Tensor, "*batch d_sae"]:
    """`feature_acts`: the positive magnitudes of the latents whose gate is open."""
    return (gate > 0) * torch.relu(magnitude)
