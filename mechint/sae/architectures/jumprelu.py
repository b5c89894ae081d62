"""JumpReLU: a pre-activation counts only above its latent's own learned threshold.

    f     = pre * (pre > threshold)
    loss  = mean((x_hat - x)^2) + sparsity * penalty [+ pre_act_coefficient * pre_act] [+ aux_coefficient * auxk]

Steps have no gradient, so the threshold learns through a rectangle of width `bandwidth` around it (Rajamanoharan et al.
2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders", eqs. 10-12). Penalties, all
divided by d_in to stand beside a mean over d_in:

    step       number of active latents a vector (the same paper)
    tanh       sum of tanh(tanh_scale * f): Anthropic, "Circuits Updates - January 2025"
    quadratic  (L0 / target_l0 - 1)^2 with L0 the batch's mean number of active latents (the same paper, appendix E;
               GemmaScope 2): the sparsity is chosen, not the weight

`ste_to_input` lets the penalty's step also push the pre-activation, as Anthropic do. `pre_act_coefficient` weighs
sum of ReLU(threshold - pre) over dead latents, which lifts them (Anthropic, there).
"""

from typing import Any, Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechint.errors import MechintError, nearest
from mechint.sae.base import SAE
from mechint.sae.losses import add_auxk, mean_squared_error, weighted_acts
from mechint.sae.objective import Loss, Objective

PENALTIES = ("step", "tanh", "quadratic")
Penalty = Literal["step", "tanh", "quadratic"]


class _Jump(torch.autograd.Function):
    """ReLU(pre) * (pre > threshold), in one product; d/d threshold = -(threshold / bandwidth) * rectangle."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold.clamp_min(0.0))  # thresholds of other tools may lie below 0

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        pre, threshold = ctx.saved_tensors
        inside = (pre - threshold).abs() < ctx.bandwidth / 2
        to_threshold = -(threshold / ctx.bandwidth) * (inside * grads[0]).flatten(end_dim=-2).sum(dim=0)
        return grads[0] * (pre > threshold.clamp_min(0.0)), to_threshold, None


class _Step(torch.autograd.Function):
    """(pre > threshold) as 0 or 1; d/d threshold = -rectangle / bandwidth, and the opposite for pre if asked."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float, to_input: bool) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.to_input = bandwidth, to_input
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        pre, threshold = ctx.saved_tensors
        through = ((pre - threshold).abs() < ctx.bandwidth / 2) * grads[0] / ctx.bandwidth
        return (through if ctx.to_input else None), -through.sum(dim=0), None, None


@final
class JumpReLUSAE(SAE):
    """Also what BatchTopK SAEs are saved as. `threshold [d_sae]` is a parameter, never below 0."""

    architecture = "jumprelu"
    shardable = True
    latents_are_independent = True
    latent_counts = ("target_l0",)
    saved_tensors = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
    options = {
        "penalty": "step",
        "bandwidth": 0.05,
        "init_threshold": 0.01,
        "target_l0": None,
        "tanh_scale": 4.0,
        "ste_to_input": False,
        "pre_act_coefficient": 0.0,
    }

    latent_vectors = {"b_enc": 0.0, "threshold": 0.0}
    threshold: nn.Parameter
    penalty: str
    bandwidth: float
    init_threshold: float
    target_l0: float | None
    tanh_scale: float
    ste_to_input: bool
    pre_act_coefficient: float

    def check_options(self) -> None:
        if self.penalty not in PENALTIES:
            raise MechintError(f"unknown --penalty {self.penalty!r}; {nearest(self.penalty, PENALTIES)}")
        for name in ("bandwidth", "tanh_scale"):
            if not getattr(self, name) > 0:
                raise MechintError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name):g}")
        for name in ("init_threshold", "pre_act_coefficient"):
            if not getattr(self, name) >= 0:
                raise MechintError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name):g}")
        if (self.penalty == "quadratic") != (self.target_l0 is not None):
            raise MechintError("--penalty quadratic and --target-l0 belong together: give both or neither")
        if self.target_l0 is not None and not 0 < self.target_l0 <= self.d_sae:
            raise MechintError(f"--target-l0 must be above 0 and at most d_sae = {self.d_sae}, got {self.target_l0:g}")

    def vectors(self) -> dict[str, float]:
        return {**self.latent_vectors, "threshold": 0.0 if self.is_transcoder else self.init_threshold}

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return _Jump.apply(pre, self.threshold, self.bandwidth)  # type: ignore[return-value]

    @property
    def looks_across_rows(self) -> bool:
        return self.penalty == "quadratic"

    @property
    def wants_dead(self) -> bool:
        return self.pre_act_coefficient > 0

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        pre = self.pre_activations(x)
        feature_acts = self.activate(pre)
        x_hat = self.decode(feature_acts)
        terms = {"mse": mean_squared_error(x, x_hat), "l0_penalty": self._penalty(pre, feature_acts) / self.d_in}
        weights = {"mse": 1.0, "l0_penalty": objective.sparsity}
        if self.pre_act_coefficient and objective.dead is not None:
            below = weighted_acts(self, (self.threshold - pre).relu() * self.peers.mine(objective.dead))
            terms["pre_act"] = self.peers.sum_latents(below.sum(dim=1).mean()) / self.d_in
            weights["pre_act"] = self.pre_act_coefficient
        return add_auxk(Loss(terms, weights, feature_acts), self, x, x_hat, objective)

    def _penalty(self, pre: Float[Tensor, "batch d_sae"], feature_acts: Float[Tensor, "batch d_sae"]) -> Tensor:
        if self.penalty == "tanh":
            bounded = torch.tanh(self.tanh_scale * weighted_acts(self, feature_acts))
            return self.peers.sum_latents(bounded.sum(dim=1).mean())
        active: Tensor = _Step.apply(pre, self.threshold, self.bandwidth, self.ste_to_input)  # type: ignore[assignment]
        l0 = self.peers.sum_latents(active.sum(dim=1).mean())
        return l0 if self.target_l0 is None else (self.peers.mean_rows(l0) / self.target_l0 - 1.0).square()

    @torch.no_grad()
    def constrain(self) -> None:
        super().constrain()
        self.threshold.clamp_min_(0.0)
