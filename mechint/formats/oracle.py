"""What an SAE computes, written once more, in float64: what conversions are proved with and tests compare with.

Nothing here calls the class's own forward. As its documentation (`mechint/sae/base.py`) and the files define it:

    u     = normalised(input_scale * x)            (none, constant_norm_rescale, layer_norm)
    pre   = (u - b_dec) @ W_enc + b_enc            (without b_dec where apply_b_dec_to_input is off)
    f     = standard   ReLU(pre)
            jumprelu   ReLU(pre) where pre > threshold
            topk       ReLU of the k largest entries of pre (without relu: of those, negative ones stay too)
            gated      ReLU(v * exp(r_mag) + b_mag) where v + b_gate > 0, v = (u - b_dec) @ W_enc
    x_hat = undone(f @ W_dec + b_dec) / input_scale  (a transcoder undoes nothing; with W_skip it adds x @ W_skip^T)

With rescale_acts_by_decoder_norm (SAELens) topk multiplies pre by n = |W_dec row| before it chooses; f / n is decoded.
"""

import copy

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.sae.base import LAYER_NORM_EPS, MIN_DECODER_NORM, SAE

# Columns of a weight matrix that are turned into float64 at once: an SAE of 5 GB should not need 15.
BLOCK = 8192


def reference_encode(sae: SAE, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """`feature_acts` in float64, as the SAE's origin defines them."""
    return activate(sae, reference_pre(sae, x))


def reference_pre(sae: SAE, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
    """What the activation function is applied to, in float64; of a gated SAE the gate's."""
    u = _normalised(sae, x.double() * sae.cfg.input_scale)[0]
    if sae.cfg.apply_b_dec_to_input:
        u = u - tensor_of(sae, "b_dec").double()
    pre = times(u, tensor_of(sae, "W_enc"))
    pre = pre + tensor_of(sae, "b_gate" if sae.architecture == "gated" else "b_enc").double()
    return pre * decoder_norms(sae) if sae.cfg.rescale_acts_by_decoder_norm else pre


def activate(sae: SAE, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
    """`feature_acts` from `reference_pre`."""
    if sae.architecture == "standard":
        return pre.relu()
    if sae.architecture == "jumprelu":
        return pre.relu() * (pre > tensor_of(sae, "threshold").double())
    if sae.architecture == "topk":
        top = pre.topk(sae.k, dim=1)
        kept = top.values.relu() if sae.relu else top.values
        return torch.zeros_like(pre).scatter_(1, top.indices, kept)
    if sae.architecture == "gated":
        b_gate, b_mag, r_mag = (tensor_of(sae, name).double() for name in ("b_gate", "b_mag", "r_mag"))
        return (pre > 0) * ((pre - b_gate) * r_mag.exp() + b_mag).relu()
    # an architecture that somebody added (docs/extend.md) is its own definition
    return copy.deepcopy(sae).double().activate(pre).detach()


def reference_decode(
    sae: SAE, feature_acts: Float[Tensor, "batch d_sae"], x: Float[Tensor, "batch d_in"]
) -> Float[Tensor, "batch d_out"]:
    """Reconstruction in float64. `x` is the input: what was done to it is undone, and a skip connection reads it."""
    f = feature_acts.double()
    if sae.cfg.rescale_acts_by_decoder_norm:
        f = f / decoder_norms(sae)
    out = tensor_of(sae, "b_dec").double().expand(len(f), -1)
    W_dec = tensor_of(sae, "W_dec")
    for start in range(0, len(W_dec), BLOCK):
        out = out + f[:, start : start + BLOCK] @ W_dec[start : start + BLOCK].double()
    if sae.is_transcoder:
        return out + x.double() @ tensor_of(sae, "W_skip").double().T if sae.cfg.has_skip else out
    _, factor, shift = _normalised(sae, x.double() * sae.cfg.input_scale)
    return (out * factor + shift) / sae.cfg.input_scale


def _normalised(sae: SAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`(u, factor, shift)`: the input as encoded, and what maps a reconstruction of u back."""
    one, zero = torch.ones(len(x), 1, dtype=x.dtype), torch.zeros(len(x), 1, dtype=x.dtype)
    if sae.cfg.normalize_activations == "constant_norm_rescale":
        factor = x.norm(dim=1, keepdim=True).clamp_min(1e-12) / sae.d_in**0.5
        return x / factor, factor, zero
    if sae.cfg.normalize_activations == "layer_norm":
        mean = x.mean(dim=1, keepdim=True)
        std = (x - mean).std(dim=1, keepdim=True)
        return (x - mean) / (std + LAYER_NORM_EPS), std, mean
    return x, one, zero


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix` in float64, a block of columns at a time."""
    return torch.cat([x @ block.double() for block in matrix.split(BLOCK, dim=1)], dim=1)


def decoder_norms(sae: SAE) -> Float[Tensor, " d_sae"]:
    return tensor_of(sae, "W_dec").double().norm(dim=1).clamp_min(MIN_DECODER_NORM)


def tensor_of(sae: SAE, name: str) -> Tensor:
    """A parameter in float32 on the CPU."""
    return sae.get_parameter(name).detach().to("cpu", torch.float32)
