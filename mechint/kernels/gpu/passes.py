"""Loss and gradients of each architecture, written out: what `sae.loss` and autograd give, in fewer passes over memory.

Three things make it cheaper than autograd: the gradient of the input is not formed (autograd forms `d_pre @ W_enc.T`, a
whole product, for the sake of `b_dec`; summed over the batch first it is one vector), most of what has the size of the
code is changed in place, and nothing waits for the device, so that a CUDA graph can hold all of it.

With N = batch * d_in and error = x_hat - x, for every architecture

    d_x_hat = 2 error / N                 d_acts = d_x_hat @ W_dec.T          W_dec.grad = acts.T @ d_x_hat
    W_enc.grad = (x - b_dec).T @ d_pre    b_dec.grad = sum d_x_hat - W_enc @ sum d_pre

and what differs is how `acts` comes from `pre` and `d_pre` from `d_acts`. The formulas are those in the docstrings of
mechint/sae/architectures. Gradients are written into the parameters' `.grad`, which has to be there.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechint.kernels.contract import Pass
from mechint.kernels.gpu.products import Products
from mechint.sae import SAE
from mechint.sae.architectures.batchtopk import BatchSelecting
from mechint.sae.architectures.jumprelu import JumpReLUSAE
from mechint.sae.architectures.matryoshka_batchtopk import MatryoshkaBatchTopKSAE, check_widths
from mechint.sae.architectures.standard import StandardSAE
from mechint.sae.architectures.topk import TopKSAE


class Revive(NamedTuple):
    """AuxK's part of a step. `latents` may be longer than there are dead ones; `valid` tells which entries count."""

    latents: Int[Tensor, " n"]
    valid: Bool[Tensor, " n"]
    k_aux: int
    coefficient: float


class Inputs(NamedTuple):
    """One step's data, all on the device."""

    x: Float[Tensor, "batch d_in"]
    sparsity: Float[Tensor, ""]
    dead: Bool[Tensor, " d_sae"] | None = None  # for JumpReLU's pre_act term
    revive: Revive | None = None
    widths: tuple[int, ...] | None = None  # matryoshka


class Outcome(NamedTuple):
    """A pass, and for batch-wide selections the smallest activation that stayed (inf where none is positive)."""

    result: Pass
    cut: Float[Tensor, ""] | None


class Dense:
    """The products that every architecture needs, over one batch. A `code` is what `mm.cast` made of acts."""

    def __init__(self, sae: SAE, inputs: Inputs, mm: Products):
        self.sae, self.inputs, self.mm, self.x = sae, inputs, mm, inputs.x
        self.centred = mm.cast(inputs.x - sae.b_dec)
        self.W_enc, self.W_dec = mm.cast(sae.W_enc), mm.cast(sae.W_dec)

    def encode(self) -> Float[Tensor, "batch d_sae"]:
        """`(x - b_dec) @ W_enc`, no bias."""
        return self.mm(self.centred, self.W_enc)

    def error(self, code: Shaped[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_in"]:
        """x_hat - x."""
        return self.mm(code, self.W_dec).add_(self.sae.b_dec).sub_(self.x)

    def decoder_gradient(
        self, code: Shaped[Tensor, "batch d_sae"], error: Float[Tensor, "batch d_in"]
    ) -> Float[Tensor, "batch d_sae"]:
        """W_dec, b_dec, and what is returned: d_acts, all from the mean squared error."""
        d_x_hat = error * (2 / error.numel())
        torch.sum(d_x_hat, dim=0, out=grad(self.sae, "b_dec"))
        d_x_hat = self.mm.cast(d_x_hat)
        self.mm(code.t(), d_x_hat, out=grad(self.sae, "W_dec"))
        return self.mm(d_x_hat, self.W_dec.t())

    def encoder_gradient(
        self, d_code: Shaped[Tensor, "batch d_sae"], total: Float[Tensor, " d_sae"], bias: str = "b_enc"
    ) -> None:
        """W_enc, the bias that is added to its product, and the encoder's share of b_dec; `total` is the sum of d_pre
        over the batch, `d_code` what `mm.cast` made of d_pre."""
        # W_enc lies column by column: its transpose is what a product can write into
        self.mm(d_code.t(), self.centred, out=grad(self.sae, "W_enc").t())
        grad(self.sae, bias).copy_(total)
        grad(self.sae, "b_dec").sub_(self.sae.W_enc @ total)

    def finish(
        self,
        terms: dict[str, Tensor],
        weights: dict[str, Tensor | float],
        fire_counts: Int[Tensor, " d_sae"],
        error: Float[Tensor, "batch d_in"],
        bias: str = "b_enc",
    ) -> Pass:
        """AuxK if asked, the loss, and what fired."""
        if self.inputs.revive is not None:
            terms["auxk"] = add_auxk(self.sae, self.inputs, error, self.mm, bias)
            weights["auxk"] = self.inputs.revive.coefficient
        return Pass({"loss": total_loss(terms, weights), **terms}, fire_counts.sum(), fire_counts)


def grad(sae: SAE, name: str) -> Tensor:
    gradient = sae.get_parameter(name).grad
    assert gradient is not None, "the kernel makes the gradients' buffers"
    return gradient


def total_loss(terms: dict[str, Tensor], weights: dict[str, Tensor | float]) -> Tensor:
    parts = [terms[name] * weight for name, weight in weights.items()]
    return torch.stack(parts).sum()


def standard(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    assert isinstance(sae, StandardSAE)
    dense = Dense(sae, inputs, mm)
    code, fire_counts, penalty = mm.relu(dense.encode(), sae.b_enc, sae.saturation)
    error = dense.error(code)
    terms = {"mse": error.square().mean(), "l1": penalty / code.numel()}
    d_acts = dense.decoder_gradient(code, error)
    dense.encoder_gradient(*mm.mask(d_acts, code, inputs.sparsity / code.numel(), sae.saturation))
    return Outcome(dense.finish(terms, {"mse": 1.0, "l1": inputs.sparsity}, fire_counts, error), None)


def topk(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    assert isinstance(sae, TopKSAE)
    dense = Dense(sae, inputs, mm)
    acts = sae.activate(dense.encode().add_(sae.b_enc))
    return Outcome(_selected(dense, acts), None)


def batchtopk(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    dense = Dense(sae, inputs, mm)
    acts, cut = select_batch(sae, dense.encode().add_(sae.b_enc))
    return Outcome(_selected(dense, acts), cut)


def select_batch(sae: SAE, pre: Float[Tensor, "batch d_sae"]) -> tuple[Tensor, Tensor]:
    """`BatchSelecting.select` without waiting for the device: the acts that stay, and their cut."""
    assert isinstance(sae, BatchSelecting)
    scores = pre.relu_().flatten()
    top = scores.topk(sae.n_kept(len(pre)))
    cut = torch.where(top.values > 0, top.values, torch.inf).min()
    return torch.zeros_like(scores).scatter_(0, top.indices, top.values).view_as(pre), cut


def _selected(dense: Dense, acts: Float[Tensor, "batch d_sae"]) -> Pass:
    """What follows a selection: no penalty, gradients at what is active."""
    code = dense.mm.cast(acts)
    error = dense.error(code)
    d_acts = dense.decoder_gradient(code, error)
    dense.encoder_gradient(*dense.mm.mask(d_acts, code, torch.zeros_like(dense.inputs.sparsity)))
    return dense.finish({"mse": error.square().mean()}, {"mse": 1.0}, (acts > 0).sum(dim=0), error)


def jumprelu(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    assert isinstance(sae, JumpReLUSAE)
    dense = Dense(sae, inputs, mm)
    pre = dense.encode().add_(sae.b_enc)
    batch, d_in = inputs.x.shape
    above = pre > sae.threshold
    acts = pre * above
    inside = (pre - sae.threshold).abs() < sae.bandwidth / 2
    code = mm.cast(acts)
    error = dense.error(code)
    d_acts = dense.decoder_gradient(code, error)
    to_step, penalty = penalty_gradient(sae, acts, above, inputs.sparsity)
    if sae.penalty == "tanh":
        d_acts += (1 - torch.tanh(acts * sae.tanh_scale).square()) * (inputs.sparsity * sae.tanh_scale / (batch * d_in))
    d_threshold = (inside * d_acts).sum(dim=0).mul_(-sae.threshold / sae.bandwidth)
    d_pre = d_acts.mul_(above)
    terms = {"mse": error.square().mean(), "l0_penalty": penalty}
    weights: dict[str, Tensor | float] = {"mse": 1.0, "l0_penalty": inputs.sparsity}
    if to_step is not None:
        d_threshold -= inside.sum(dim=0) * to_step / sae.bandwidth
        if sae.ste_to_input:
            d_pre += inside * (to_step / sae.bandwidth)
    if sae.pre_act_coefficient and inputs.dead is not None:
        below = (sae.threshold - pre).relu_().mul_(inputs.dead)
        terms["pre_act"], weights["pre_act"] = below.sum() / (batch * d_in), sae.pre_act_coefficient
        push = (below > 0) * (sae.pre_act_coefficient / (batch * d_in))
        d_pre -= push
        d_threshold += push.sum(dim=0)
    grad(sae, "threshold").copy_(d_threshold)
    dense.encoder_gradient(mm.cast(d_pre), d_pre.sum(dim=0))
    return Outcome(dense.finish(terms, weights, (acts > 0).sum(dim=0), error), None)


def penalty_gradient(sae: JumpReLUSAE, acts: Tensor, above: Tensor, sparsity: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gradient of the weighted penalty to each entry's step (None for tanh, which has none), and the penalty."""
    batch = len(acts)
    if sae.penalty == "tanh":
        return None, torch.tanh(acts * sae.tanh_scale).sum() / (batch * sae.d_in)
    l0 = above.sum() / batch
    if sae.target_l0 is None:
        return sparsity / (batch * sae.d_in), l0 / sae.d_in
    excess = l0 / sae.target_l0 - 1
    return sparsity * 2 * excess / (sae.target_l0 * batch * sae.d_in), excess.square() / sae.d_in


def gated(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    dense = Dense(sae, inputs, mm)
    b_gate, b_mag, scale = sae.get_parameter("b_gate"), sae.get_parameter("b_mag"), sae.get_parameter("r_mag").exp()
    u = dense.encode()
    gate = (u + b_gate).relu_()
    acts = (u * scale).add_(b_mag).relu_().mul_(gate > 0)
    code = mm.cast(acts)
    error, gate_error = dense.error(code), dense.error(mm.cast(gate))
    terms = {"mse": error.square().mean(), "l1": gate.mean(), "gate_mse": gate_error.square().mean()}
    d_mag = dense.decoder_gradient(code, error).mul_(acts > 0)
    # the decoder is a constant for the gate's own reconstruction
    d_gate = mm(mm.cast(gate_error * (2 / error.numel())), dense.W_dec.t())
    d_gate.add_(inputs.sparsity / gate.numel()).mul_(gate > 0)
    torch.sum(d_mag, dim=0, out=grad(sae, "b_mag"))
    grad(sae, "r_mag").copy_((d_mag * u).sum(dim=0).mul_(scale))
    d_u = d_mag.mul_(scale).add_(d_gate)
    dense.encoder_gradient(mm.cast(d_u), d_u.sum(dim=0), "b_gate")
    # the magnitude reaches the product, not the gate's bias
    torch.sum(d_gate, dim=0, out=grad(sae, "b_gate"))
    weights: dict[str, Tensor | float] = {"mse": 1.0, "l1": inputs.sparsity, "gate_mse": 1.0}
    return Outcome(dense.finish(terms, weights, (acts > 0).sum(dim=0), error, "b_gate"), None)


def matryoshka_batchtopk(sae: SAE, inputs: Inputs, mm: Products) -> Outcome:
    assert isinstance(sae, MatryoshkaBatchTopKSAE)
    dense = Dense(sae, inputs, mm)
    acts, cut = select_batch(sae, dense.encode().add_(sae.b_enc))
    widths = check_widths(inputs.widths or sae.widths, sae.d_sae)
    code, n, starts = mm.cast(acts), len(widths), (0, *widths)
    error, errors = sae.b_dec - inputs.x, []
    for start, width in zip(starts, widths, strict=False):
        error = error + mm(code[:, start:width], dense.W_dec[start:width])
        errors.append(error)
    narrow = [error.square().mean() for error in errors]
    terms: dict[str, Tensor] = {"mse": narrow.pop()}
    weights: dict[str, Tensor | float] = {"mse": 1 / n}
    if narrow:
        terms["prefix_mse"], weights["prefix_mse"] = torch.stack(narrow).mean(), (n - 1) / n
    # latents between two widths are in every reconstruction from the wider one on
    d_pre, d_x_hat = torch.empty_like(acts), torch.zeros_like(error)
    for start, width, part in reversed(list(zip(starts, widths, errors, strict=False))):
        d_x_hat = d_x_hat + part * (2 / (n * part.numel()))
        d_code = mm.cast(d_x_hat)
        mm(code[:, start:width].t(), d_code, out=grad(sae, "W_dec")[start:width])
        torch.mul(mm(d_code, dense.W_dec[start:width].t()), acts[:, start:width] > 0, out=d_pre[:, start:width])
    torch.sum(d_x_hat, dim=0, out=grad(sae, "b_dec"))
    dense.encoder_gradient(mm.cast(d_pre), d_pre.sum(dim=0))
    return Outcome(dense.finish(terms, weights, (acts > 0).sum(dim=0), error), cut)


def add_auxk(sae: SAE, inputs: Inputs, error: Float[Tensor, "batch d_in"], mm: Products, bias: str) -> Tensor:
    """The term of `mechint.sae.base.auxk` (its formula and source are there); its gradients are added to the others."""
    assert inputs.revive is not None
    latents, valid, k_aux, coefficient = inputs.revive
    centred = mm.cast(inputs.x - sae.b_dec)
    W_enc, W_dec = sae.W_enc.t()[latents], mm.cast(sae.W_dec[latents])
    pre = mm(centred, mm.cast(W_enc).t()).add_(sae.get_parameter(bias)[latents]).masked_fill_(~valid, -torch.inf)
    if k_aux < len(latents):
        cut = pre.topk(k_aux, dim=1).indices
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, cut, True) & valid
    else:
        kept = valid.expand_as(pre)
    if sae.aux_relu:
        kept = kept & (pre > 0)
    code = mm.cast(torch.where(kept, pre, 0.0))
    residual = mm(code, W_dec).add_(error)
    term = residual.square().mean()
    d_x_hat = mm.cast(residual.mul_(2 * coefficient / residual.numel()))
    d_pre = mm(d_x_hat, W_dec.t()).mul_(kept)
    total = d_pre.sum(dim=0)
    # entries that do not count add 0
    grad(sae, "W_dec").index_add_(0, latents, mm(code.t(), d_x_hat))
    grad(sae, "W_enc").t().index_add_(0, latents, mm(mm.cast(d_pre).t(), centred))
    grad(sae, bias).index_add_(0, latents, total)
    grad(sae, "b_dec").sub_(total @ W_enc)
    return term


PASSES: dict[str, Callable[[SAE, Inputs, Products], Outcome]] = {
    "standard": standard,
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
    "gated": gated,
    "matryoshka_batchtopk": matryoshka_batchtopk,
}
