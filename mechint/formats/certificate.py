"""Proof that a conversion changed nothing: probe vectors through both sides, and the largest difference.

Both sides are computed in float64 from the float32 tensors, by `oracle.py`: what is written is read back first, by the
format's own reader, so a wrong key, orientation or setting shows. Probes lie where this SAE works: around its `b_dec`,
at sizes from well below to well above those at which its latents begin to fire.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.formats.oracle import BLOCK, activate, reference_decode, reference_pre, tensor_of
from mechint.sae.base import SAE

# Weights that are the same bits give the same codes; folded ones are rounded to float32 once more.
EXACT, FOLDED = 1e-6, 1e-5
# Sizes of the probes, in units of the size at which the median latent begins to fire.
SIZES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# A pre-activation this close to where its latent switches (in units of the probe's largest) may fall on either side
# when weights are rounded.
BORDER = 1e-6
# Codes that are computed at once: 32 MB in float64.
ENTRIES = 1 << 22


@dataclass(frozen=True)
class Certificate:
    """What probes showed.

    Attributes:
        probe_size: RMS of the entries of a probe of size 1, around `b_dec`.
        folded: what moved from a setting into the weights, in words.
        weights_equal: whether both sides hold the same bits.
        encode_difference: largest difference of a code, relative to the largest code of its probe (or to what `b_dec`
            adds to a pre-activation, where that is larger: in float32 the original rounds at that size too).
        decode_difference: largest difference of a reconstructed entry, relative to the largest one of its probe.
        added_latents: latents at the end that only the written SAE has; their codes must be 0.
        at_border: codes left out because rounding decides whether their latent fires.
        mean_l0: latents active a probe; the probes say little where it is 0.
    """

    n_probes: int
    seed: int
    probe_size: float
    folded: tuple[str, ...]
    weights_equal: bool
    added_latents: int
    encode_difference: float
    decode_difference: float
    at_border: int
    mean_l0: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return max(self.encode_difference, self.decode_difference) <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "folded": list(self.folded), "holds": self.holds}


def certify(
    before: SAE, after: SAE, *, folded: tuple[str, ...] = (), n_probes: int = 192, seed: int = 0
) -> Certificate:
    """Compare two SAEs that should be the same function of an activation.

    Args:
        folded: what was folded on the way; without it the tolerance is 1e-6, with it 1e-5.
        n_probes: vectors, spread evenly over the sizes.

    Raises:
        MechintError: widths that differ, other than by latents that were added at the end.
    """
    added = after.d_sae - before.d_sae
    if (before.d_in, before.d_out) != (after.d_in, after.d_out) or added < 0:
        raise MechintError(
            f"the widths differ: [{before.d_in}, {before.d_sae}] before, [{after.d_in}, {after.d_sae}] after"
        )
    size = firing_size(before)
    x = probes(before, size, n_probes, seed)
    reach = bias_reach(before)
    encode, decode, at_border, active = 0.0, 0.0, 0, 0
    for part in x.split(max(1, ENTRIES // before.d_sae)):
        pre = reference_pre(before, part)
        pre_after = reference_pre(after, part)
        f, f_after = activate(before, pre), activate(after, pre_after)
        f_before = torch.nn.functional.pad(f, (0, added))
        # a latent that rounding switched, not the conversion: its code, and that probe's reconstruction, are left out
        border = torch.nn.functional.pad(on_border(before, pre, reach), (0, added))
        border &= on_border(after, pre_after, reach)
        switched = border & ((f_before != 0) != (f_after != 0))
        differs = (f_before - f_after).abs() / _largest_in_row(f_before).clamp_min(reach)
        encode = max(encode, _largest(differs.masked_fill(switched, 0.0)))
        out_before, out_after = reference_decode(before, f, part), reference_decode(after, f_after, part)
        differs = (out_before - out_after).abs() / _largest_in_row(out_before)
        decode = max(decode, _largest(differs[~switched.any(dim=1)]))
        at_border += int(switched.sum())
        active += int((f_before != 0).sum())
    return Certificate(
        n_probes=len(x),
        seed=seed,
        probe_size=size,
        folded=folded,
        weights_equal=same_tensors(before, after),
        added_latents=added,
        encode_difference=encode,
        decode_difference=decode,
        at_border=at_border,
        mean_l0=active / len(x),
        tolerance=FOLDED if folded else EXACT,
    )


def probes(sae: SAE, size: float, n_probes: int, seed: int) -> Float[Tensor, "n_probes d_in"]:
    """Half of them Gaussian around `b_dec`, half mixtures of a few encoder directions, which make latents fire."""
    generator = torch.Generator().manual_seed(seed)
    around = tensor_of(sae, "b_dec").double() / sae.cfg.input_scale
    if sae.is_transcoder or not sae.cfg.apply_b_dec_to_input:
        around = torch.zeros(sae.d_in, dtype=torch.float64)
    gaussian = torch.randn(n_probes, sae.d_in, generator=generator, dtype=torch.float64)
    chosen = torch.randint(sae.d_sae, (n_probes, 4), generator=generator)
    rows = tensor_of(sae, "W_enc").T[chosen].double()
    rows = rows / rows.norm(dim=2, keepdim=True).clamp_min(1e-12) * sae.d_in**0.5
    share = torch.rand(n_probes, 4, 1, generator=generator, dtype=torch.float64)
    mixed = (rows * share).sum(dim=1)
    every_other = (torch.arange(n_probes) % 2 == 0)[:, None]
    sizes = torch.tensor(SIZES, dtype=torch.float64)[torch.arange(n_probes) // 2 % len(SIZES)]
    x = around + torch.where(every_other, gaussian, mixed) * (size * sizes)[:, None]
    return x.float()


def firing_size(sae: SAE) -> float:
    """RMS of the entries of an input at which the median latent begins to fire: |offset| / |W_enc column|.

    Where latents have no offset, any size is as good: that of `b_dec`, or 1.
    """
    tensors = sae.weights()
    norms = tensors["W_enc"].double().norm(dim=0)
    offset = -tensors["b_gate" if sae.architecture == "gated" else "b_enc"].double()
    if sae.architecture == "jumprelu":
        offset = offset + tensors["threshold"].double()
    alive = norms > 0
    found = float((offset[alive].abs() / norms[alive]).median()) if bool(alive.any()) else 0.0
    if found <= 0:
        found = float(tensors["b_dec"].double().square().mean().sqrt()) or 1.0
    return found / sae.cfg.input_scale


def bias_reach(sae: SAE) -> float:
    """Largest that `b_dec` adds to a pre-activation, or takes from it; 0 for a transcoder."""
    if sae.is_transcoder:
        return 0.0
    b_dec = tensor_of(sae, "b_dec").double()
    return max(float((b_dec @ block.double()).abs().max()) for block in tensor_of(sae, "W_enc").split(BLOCK, dim=1))


def on_border(sae: SAE, pre: Float[Tensor, "batch d_sae"], reach: float = 0.0) -> Bool[Tensor, "batch d_sae"]:
    """Which entries lie so close to where they switch on that rounding may decide."""
    near = BORDER * pre.abs().amax(dim=1, keepdim=True).clamp_min(reach)
    if sae.architecture == "topk":
        k = sae.k
        cut = pre.topk(min(k + 1, pre.shape[1]), dim=1).values
        return ((pre - cut[:, k - 1 : k]).abs() <= near) | ((pre - cut[:, -1:]).abs() <= near)
    cut = tensor_of(sae, "threshold").double() if sae.architecture == "jumprelu" else 0.0
    return (pre - cut).abs() <= near


def same_tensors(before: SAE, after: SAE) -> bool:
    """Whether the tensors that both have are the same bits, as far as the first one reaches."""
    ours, theirs = before.weights(), after.weights()
    return all(
        torch.equal(ours[name], theirs[name][tuple(map(slice, ours[name].shape))])
        for name in ours.keys() & theirs.keys()
    )


def _largest_in_row(values: Float[Tensor, "batch width"]) -> Float[Tensor, "batch 1"]:
    return values.abs().amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
