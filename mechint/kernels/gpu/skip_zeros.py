"""Passes that skip a code's zeros: one dense encoder product, and after it only the entries that are not zero.

At 32 of 131,072 latents the four products after the encoder do 4,000 times more multiplications than they have to.
Entries are listed by row and by latent (see triton_kernels.py), decoded by gathering rows of W_dec, and each latent's
gradients are summed over its own list. All of it after the encoder product is float32, whatever the precision.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.kernels.contract import Pass
from mechint.kernels.gpu.passes import Inputs, Outcome, add_auxk, grad, total_loss
from mechint.kernels.gpu.products import Products, has_triton, kernels
from mechint.sae import SAE
from mechint.sae.architectures.batchtopk import BatchTopKSAE
from mechint.sae.architectures.jumprelu import JumpReLUSAE
from mechint.sae.architectures.standard import StandardSAE
from mechint.sae.architectures.topk import TopKSAE
from mechint.sae.base import MIN_DECODER_NORM

# Multiplications a second of products, and bytes a second of gathered rows, on a current data-centre GPU. Estimates
# from data sheets, not measured: they only choose between two ways to the same result.
PRODUCT_RATE = {"float32": 50e12, "tf32": 350e12, "bf16": 700e12}
GATHER_RATE = 5e12
# Rows of W_dec are held in a program's registers.
MAX_D_IN = 8192
# Latents whose pre-activations exist at the same time when TopK selects: the rest have been reduced to candidates.
SELECT_CHUNK = 16_384
# Neighbours that a selection first stands for by their maximum.
GROUP = 32


class Entries(NamedTuple):
    """A code as lists (triton_kernels). `slots` is None where slots are places in a dense buffer."""

    pre: Float[Tensor, "..."]  # by slot
    starts: Int[Tensor, " batch"]
    counts: Int[Tensor, " batch"]
    latents: Int[Tensor, " n"]  # in row order
    latent_starts: Int[Tensor, " d_sae"]
    latent_counts: Int[Tensor, " d_sae"]
    rows: Int[Tensor, " n"]  # in latent order
    slots: Int[Tensor, " n"] | None  # in latent order
    n_active: Int[Tensor, ""] | None  # JumpReLU's, where entries are listed that are not active


def fits(sae: SAE) -> bool:
    """Whether there is a sparse pass for this SAE, here."""
    if not has_triton(sae.W_dec.device) or sae.d_in > MAX_D_IN:
        return False
    if isinstance(sae, JumpReLUSAE):
        return sae.penalty != "tanh" and not sae.pre_act_coefficient
    return sae.architecture in ("standard", "topk", "batchtopk")


def pays(sae: SAE, precision: str, l0: float | None) -> bool:
    """Whether skipping zeros is expected to be faster; `l0` is the number of active latents seen last, if any.

    Four products of 2 batch d_in d_sae operations, against four gathers of l0 rows of 4 d_in bytes a vector.
    """
    l0 = sae.k if isinstance(sae, TopKSAE | BatchTopKSAE) else l0
    return l0 is not None and 16 * l0 / GATHER_RATE < 8 * sae.d_sae / PRODUCT_RATE[precision]


def sparse_pass(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    """Loss and gradients as `passes` gives them."""
    x, (batch, d_in) = inputs.x, inputs.x.shape
    entries, cut = _entries(sae, inputs, mm)
    jump = isinstance(sae, JumpReLUSAE)
    threshold = sae.threshold if jump else sae.b_enc  # not read without JUMP
    dense_slots, slots = entries.slots is None, entries.rows if entries.slots is None else entries.slots
    shape = {"ENTRIES": max(1, 4096 // _block(d_in)), "BLOCK_D": _block(d_in), "num_warps": 8 if d_in > 1024 else 4}
    error, d_acts, code_sums = torch.empty_like(x), torch.empty_like(entries.pre), torch.empty_like(x[:, 0])
    scale, saturation = 2 / x.numel(), sae.saturation if isinstance(sae, StandardSAE) else 0.0
    kernels().reconstruct[(batch,)](
        x, sae.W_dec, sae.b_dec, entries.pre, threshold, entries.starts, entries.counts, entries.latents,
        error, d_acts, code_sums, scale, saturation, sae.d_sae, d_in, JUMP=jump, DENSE_SLOTS=dense_slots, **shape,
    )  # fmt: skip

    terms = {"mse": error.square().mean()}
    weights: dict[str, Tensor | float] = {"mse": 1.0}
    shift, to_step = torch.zeros_like(inputs.sparsity), torch.zeros_like(inputs.sparsity)
    if sae.architecture == "standard":
        terms["l1"], weights["l1"] = code_sums.sum() / (batch * sae.d_sae), inputs.sparsity
        shift = inputs.sparsity / (batch * sae.d_sae)
    elif jump:
        assert entries.n_active is not None
        l0 = entries.n_active / batch
        to_step = inputs.sparsity / (batch * d_in)
        if sae.target_l0 is not None:
            excess = l0 / sae.target_l0 - 1
            l0, to_step = excess.square(), to_step * (2 * excess / sae.target_l0)
        terms["l0_penalty"], weights["l0_penalty"] = l0 / d_in, inputs.sparsity

    fire_counts = torch.empty(sae.d_sae, dtype=torch.int64, device=x.device)
    grad_bias = grad(sae, "b_enc")
    kernels().latent_gradients[(sae.d_sae,)](
        x, sae.b_dec, error, entries.pre, d_acts, threshold, entries.latent_starts, entries.latent_counts,
        entries.rows, slots, shift, to_step, grad(sae, "W_dec"), grad(sae, "W_enc"), grad_bias,
        grad(sae, "threshold") if jump else grad_bias, fire_counts, scale,
        sae.bandwidth if jump else 1.0, saturation, sae.d_sae, d_in, JUMP=jump,
        STE_TO_INPUT=jump and sae.ste_to_input, DENSE_SLOTS=dense_slots, **shape,
    )  # fmt: skip
    torch.sum(error, dim=0, out=grad(sae, "b_dec")).mul_(scale).sub_(sae.W_enc @ grad_bias)
    if inputs.revive is not None:
        terms["auxk"], weights["auxk"] = add_auxk(sae, inputs, error, mm, "b_enc"), inputs.revive.coefficient
    result = Pass({"loss": total_loss(terms, weights), **terms}, fire_counts.sum(), fire_counts)
    return Outcome(result, cut)


def _entries(sae: SAE, inputs: Inputs, mm: Products) -> tuple[Entries, Tensor | None]:
    centred = inputs.x - sae.b_dec
    if isinstance(sae, TopKSAE):
        values, latents = select_topk(sae, mm.cast(centred), mm)
        return list_known(values, latents, sae.d_sae), None
    pre = mm(mm.cast(centred), mm.cast(sae.W_enc)).add_(sae.b_enc)
    if isinstance(sae, BatchTopKSAE):
        values, places = largest(pre.view(1, -1), sae.n_kept(len(pre)))
        cut = torch.where(values > 0, values, torch.inf).min()
        places, order = places[0].sort()
        return _list_flat(values[0][order], places, *pre.shape), cut
    return list_unknown(pre, sae), None


def select_topk(sae: TopKSAE, centred: Tensor, mm: Products) -> tuple[Tensor, Tensor]:
    """Values and latents of each row's k largest pre-activations, from one block of latents after the other.

    The k largest of all are among the k largest of each block: only `SELECT_CHUNK` columns of `pre` exist at a time.
    """
    values, latents = [], []
    for start in range(0, sae.d_sae, SELECT_CHUNK):
        block = slice(start, start + SELECT_CHUNK)
        pre = mm(centred, mm.cast(sae.W_enc[:, block])).add_(sae.b_enc[block])
        top, index = largest(pre, min(sae.k, pre.shape[1]))
        values.append(top)
        latents.append(index + start)
    if len(values) == 1:
        return values[0], latents[0]
    top, index = largest(torch.cat(values, dim=1), sae.k)
    return top, torch.cat(latents, dim=1).gather(1, index)


def largest(values: Float[Tensor, "rows n"], k: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest of each row and their places, in no order; between equal ones torch.topk decides.

    torch.topk reads its input several times. Of `n` values only those in the k groups of neighbours with the largest
    maxima can be among the k largest (every value outside is below k maxima, or equal to the least of them): the input
    is read once, for the maxima, and torch.topk sees n / 32 of them and then 32 k candidates.
    """
    n = values.shape[1]
    if n % GROUP or 2 * k * GROUP > n:
        top = values.topk(k, dim=1, sorted=False)
        return top.values, top.indices
    groups = values.unflatten(1, (-1, GROUP))
    picked = groups.amax(dim=2).topk(k, dim=1, sorted=False).indices
    candidates = groups.gather(1, picked[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    top = candidates.topk(k, dim=1, sorted=False)
    return top.values, picked.gather(1, top.indices // GROUP) * GROUP + top.indices % GROUP


def list_known(values: Float[Tensor, "batch k"], latents: Int[Tensor, "batch k"], d_sae: int) -> Entries:
    """Lists of k entries a row. Those that are not positive stay listed, and count for nothing."""
    batch, k = values.shape
    starts = torch.arange(0, batch * k, k, device=values.device)
    counts = torch.full_like(starts, k)
    return _by_latent(values.flatten(), starts, counts, latents.flatten(), d_sae, None, k)


def _list_flat(values: Float[Tensor, " n"], places: Int[Tensor, " n"], batch: int, d_sae: int) -> Entries:
    """Lists of entries at ascending places of a [batch, d_sae] code."""
    bounds = torch.searchsorted(places, torch.arange(batch + 1, device=places.device) * d_sae)
    return _by_latent(values, bounds[:-1], bounds.diff(), places % d_sae, d_sae, places // d_sae, 0)


def _by_latent(
    values: Tensor, starts: Tensor, counts: Tensor, latents: Tensor, d_sae: int, rows: Tensor | None, k: int
) -> Entries:
    """The same entries in the order of their latents, rows ascending within each: a stable sort."""
    ordered, slots = latents.sort(stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(d_sae + 1, device=values.device))
    by_latent = slots // k if rows is None else rows[slots]
    return Entries(values, starts, counts, latents, bounds[:-1], bounds.diff(), by_latent, slots, None)


def list_unknown(pre: Float[Tensor, "batch d_sae"], sae: SAE) -> Entries:
    """Lists of as many entries as there are: each could hold everything, and only what is there is written."""
    (batch, d_sae), device = pre.shape, pre.device
    jump = isinstance(sae, JumpReLUSAE)
    threshold, half_band = (sae.threshold, sae.bandwidth / 2) if jump else (sae.b_enc, 0.0)
    latents, rows = (torch.empty(batch * d_sae, dtype=torch.int32, device=device) for _ in range(2))
    counts, n_active = (torch.empty(batch, dtype=torch.int32, device=device) for _ in range(2))
    latent_counts = torch.empty(d_sae, dtype=torch.int32, device=device)
    kernels().list_rows[(batch,)](
        pre, threshold, half_band, latents, counts, n_active, d_sae, JUMP=jump, BLOCK=min(1024, _block(d_sae))
    )
    kernels().list_latents[(math.ceil(d_sae / 32),)](
        pre, threshold, half_band, rows, latent_counts, batch, d_sae, JUMP=jump, ROWS=32, LATENTS=32
    )
    starts = torch.arange(0, batch * d_sae, d_sae, device=device)
    latent_starts = torch.arange(0, batch * d_sae, batch, device=device)
    return Entries(pre.flatten(), starts, counts, latents, latent_starts, latent_counts, rows, None, n_active.sum())


@torch.no_grad()
def adam(sae: SAE, optimizer: torch.optim.Adam, lr: Tensor, too_long: Tensor, go: Bool[Tensor, ""]) -> None:
    """One step of Adam on gradients divided by `too_long`, decoder rows back to unit norm; nothing where not `go`."""
    moves = go.int()
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:  # as torch makes it
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            step = state["step"].add_(go.float()).double()
            scalars = torch.stack([lr / (1 - beta1**step), (1 - beta2**step).sqrt(), too_long.double()]).float()
            tensors = [parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
            if parameter is sae.W_enc:
                tensors = [tensor.t() for tensor in tensors]
            assert all(tensor.is_contiguous() for tensor in tensors), "moments lie as their parameter does"
            n = parameter.numel()
            width = sae.d_in if parameter.ndim == 2 else min(n, 1024)
            kernels().adam_rows[(math.ceil(n / width),)](
                *tensors, scalars, moves, beta1, 1 - beta1, beta2, 1 - beta2, group["eps"], width, n,
                UNIT=parameter is sae.W_dec, MIN_NORM=MIN_DECODER_NORM, BLOCK_D=_block(width),
                num_warps=8 if width > 1024 else 4,
            )  # fmt: skip


def _block(n: int) -> int:
    """The least power of two that holds n: Triton's blocks are powers of two."""
    return 1 << (n - 1).bit_length()
