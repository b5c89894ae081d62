"""Where training starts: tied encoder, decoder bias at the data's centre, biases for a chosen density, input scale."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.base import SAE
from mechint.sae.tensors import in_float64

# Weiszfeld's iteration ends when the estimate moves by less than this share of the data's spread.
MEDIAN_TOLERANCE = 1e-5
MEDIAN_MAX_ITERATIONS = 200


@torch.no_grad()
def tie_encoder(sae: SAE, decoder_norm: float = 1.0) -> None:
    """`W_enc = W_dec^T`, decoder rows of norm `decoder_norm` (Gao et al. 2024, A.1; Anthropic April 2024)."""
    sae.renormalize_decoder()
    sae.W_dec.mul_(decoder_norm)
    sae.W_enc.copy_(sae.W_dec.T)


@torch.no_grad()
def fit_encoder(sae: SAE, sample: Float[Tensor, "n d_in"]) -> float:
    """Multiply the encoder (weights and biases) by the number with which reconstructions of `sample` fit best, which is
    returned: s = <x - b_dec, y> / <y, y> for y = x_hat - b_dec. feature_acts are then s times what they were.

    A tied start overshoots by about d_sae / (2 d_in) with ReLU, since half of the latents are active on each vector:
    the first steps, and for 1 / (1 - beta2) steps Adam's second moments, are then those of undoing it.
    """
    dot, square = 0.0, 0.0
    for x in sample.split(2048):
        y = sae.run(x)[0] - sae.b_dec
        dot += ((x - sae.b_dec) * y).sum().item()
        square += y.square().sum().item()
    if not (dot > 0 and square > 0):
        return 1.0
    scale = dot / square
    sae.W_enc.mul_(scale)
    for name in sae.latent_offsets():
        sae.get_parameter(name).mul_(scale)
    return scale


def input_scale(sample: Float[Tensor, "n d_in"], how: Literal["none", "mean-norm", "centred-norm"]) -> float:
    """The factor that makes the mean norm of `sample` (or of its distance from its mean) sqrt(d_in); 1 for "none"."""
    if how == "none":
        return 1.0
    rows = in_float64(sample)
    if how == "centred-norm":
        rows = rows - rows.mean(dim=0)
    norm = rows.norm(dim=1).mean().item()
    if not norm > 0:
        raise MechintError("--normalize-inputs: the activations are all equal, there is nothing to scale")
    return sample.shape[1] ** 0.5 / norm


@torch.no_grad()
def centre(sample: Float[Tensor, "n d_in"], how: Literal["zero", "mean", "median"]) -> Float[Tensor, " d_in"]:
    """Start of `b_dec`: zero, the mean, or the geometric median (the point of least summed distance; Bricken et al.
    2023), by Weiszfeld's iteration in float64."""
    if how == "zero":
        return torch.zeros_like(sample[0])
    rows = in_float64(sample)
    point = rows.mean(dim=0)
    if how == "mean":
        return point.to(sample)
    for _ in range(MEDIAN_MAX_ITERATIONS):
        distances = (rows - point).norm(dim=1)
        spread = distances.median().clamp_min(1e-300)  # the mean would be an outlier's
        weights = 1.0 / distances.clamp_min(1e-12 * spread)
        moved = (weights[:, None] * rows).sum(dim=0) / weights.sum()
        step, point = (moved - point).norm(), moved
        if step < MEDIAN_TOLERANCE * spread:
            break
    return point.to(sample)


@torch.no_grad()
def set_density(sae: SAE, sample: Float[Tensor, "n d_in"], l0: float) -> None:
    """Set the encoder bias so that each latent's pre-activation is above 0 (JumpReLU: above its threshold) on a share
    l0 / d_sae of `sample`."""
    share = l0 / sae.d_sae
    if not 0 < share < 1:
        raise MechintError(f"--init-l0 must be above 0 and below d_sae = {sae.d_sae}, got {l0:g}")
    name = sae.latent_offsets()[0]
    bias = sae.get_parameter(name)
    bias.zero_()
    rank = max(1, round(share * len(sample)))
    threshold = getattr(sae, "threshold", None)
    for block in torch.arange(len(bias), device=sample.device).split(1024):
        pre = (sample - sae.b_dec) @ sae.W_enc[:, block]
        cut = pre.topk(rank, dim=0).values[-1]
        bias[block] = -cut if not isinstance(threshold, Tensor) else threshold[block] - cut
    if name == "b_gate":
        sae.get_parameter("b_mag").copy_(bias)
