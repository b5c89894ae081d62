"""A training step for a GPU: nothing waits for the host, and one launch does all of it.

A step of a small SAE is shorter on a GPU than the launches of its parts. So the whole of it, from the batch to the
renormalised weights, is captured once as a CUDA graph and replayed; what changes from step to step (the batch, the
learning rate, the sparsity weight, which latents are dead) lies in buffers that the graph reads. A loss that is not
finite is found on the device too: the update is then multiplied away there instead of being left out here.

The same code runs without capture on a CPU, where it is tested, and where it gives `--precision bf16`.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.kernels.contract import Pass, StepResult, StepSettings
from mechint.kernels.gpu import skip_zeros
from mechint.kernels.gpu.passes import PASSES, Inputs, Outcome, Revive
from mechint.kernels.gpu.products import Products, has_triton
from mechint.sae import SAE, Objective
from mechint.sae.architectures.batchtopk import CUT_RATE, BatchSelecting
from mechint.sae.architectures.jumprelu import JumpReLUSAE
from mechint.sae.base import MIN_DECODER_NORM
from mechint.sae.peers import ALONE

# Steps of one shape that run piece by piece before they are captured: libraries set themselves up in the first ones.
EAGER_STEPS = 2
# Steps between two looks at the code's density, which decide whether ReLU and JumpReLU skip their zeros: a look waits
# for the device. Counted, not timed, so that a run takes the same way each time.
LOOK_EVERY = 64


def misfit(sae: SAE, optimizer: torch.optim.Optimizer) -> str | None:
    """Why `ManualKernel` cannot train this SAE, or None if it can."""
    if sae.architecture not in PASSES:
        return f"architecture {sae.architecture!r} has no written-out backward"
    if not sae.unit_decoder:
        return "--decoder free has no written-out backward"
    if not (isinstance(optimizer, torch.optim.Adam) and all(group["fused"] for group in optimizer.param_groups)):
        return "it needs torch's fused Adam"
    if sae.peers.several_shares:
        return "its latents are split over several processes"
    if sae.peers is not ALONE and sae.looks_across_rows:
        return "several processes share a batch that has to be looked at as a whole"
    return None


@final
class ManualKernel:
    """Gradients written out (`passes`), the step captured where there is CUDA, zeros skipped where that pays.

    `sparse`: True or False fixes whether the code's zeros are skipped (`skip_zeros`); None decides by architecture and
    density, on CUDA only.
    """

    name = "manual"

    def __init__(
        self,
        sae: SAE,
        optimizer: torch.optim.Optimizer,
        *,
        project_gradient: bool = False,
        precision: str = "float32",
        sparse: bool | None = None,
    ):
        if reason := misfit(sae, optimizer):
            raise MechintError(f"--kernel manual cannot train this SAE, {reason}: use --kernel dense")
        assert isinstance(optimizer, torch.optim.Adam), "misfit() checks"
        self.device = sae.W_dec.device
        self.sae, self.optimizer, self.project_gradient = sae, optimizer, project_gradient
        self.sparse = sparse if sparse is not None or skip_zeros.fits(sae) else False
        # by the interpreter only where a test asks for it
        self.fuses = has_triton(self.device) and (self.device.type == "cuda" or bool(sparse))
        self.mm = Products(precision, self.device, fuse=self.fuses)
        self.grads = {name: torch.zeros_like(parameter) for name, parameter in sae.named_parameters()}
        self.captures = self.device.type == "cuda"
        self.lr = torch.zeros((), device=self.device)
        self.cut: Tensor | None = None
        self.l0: float | None = None  # at the last look
        self.steps = 0
        self.seen: dict[tuple[object, ...], int] = {}
        self.captured: dict[tuple[object, ...], _Captured] = {}
        self.pool: Any = None

    @torch.no_grad()
    def backward(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Pass:
        with self.mm.active():
            outcome = self._pass(self._inputs(x, objective), self._skips_zeros())
        self.cut = outcome.cut
        return outcome.result

    @torch.no_grad()
    def update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        self.lr.fill_(lr)
        cut, self.cut = self.cut, None
        return self._update(torch.ones((), dtype=torch.bool, device=self.device), cut, max_grad_norm)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch d_in"], settings: StepSettings) -> StepResult:
        inputs, skips = self._inputs(x, settings.objective), self._skips_zeros()
        self.lr.fill_(settings.lr)
        with self.mm.active():
            result = self._captured_or_whole(inputs, skips, settings.max_grad_norm)
        self.steps += 1
        if self.sparse is None and self.steps % LOOK_EVERY == 1:
            self.l0 = result.n_active.item() / len(x)
        return result

    def _captured_or_whole(self, inputs: Inputs, skips: bool, max_grad_norm: float) -> StepResult:
        if not self.captures or inputs.widths is not None:  # widths drawn anew each step would be a graph each
            return self._whole(inputs, skips, max_grad_norm)
        key = (*_structure(inputs), max_grad_norm, skips)
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] <= EAGER_STEPS:
            return self._whole(inputs, skips, max_grad_norm)
        if key not in self.captured:
            self.captured[key] = self._capture(inputs, skips, max_grad_norm)
        return self.captured[key].replay(inputs)

    def _skips_zeros(self) -> bool:
        if self.sparse is not None:
            return self.sparse
        return self.device.type == "cuda" and skip_zeros.pays(self.sae, self.mm.precision, self.l0)

    def _inputs(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Inputs:
        """The objective as tensors. Waits for the device only to know how many latents AuxK revives."""
        sae, dead = self.sae, objective.dead
        revive = None
        if dead is not None and objective.aux_coefficient and objective.k_aux and (n_dead := int(dead.sum())):
            # padded to a power of two: few sizes, few graphs
            size = min(sae.d_sae, max(64, 1 << (n_dead - 1).bit_length()))
            latents = dead.to(torch.int8).argsort(descending=True, stable=True)[:size]
            revive = Revive(latents, dead[latents], objective.k_aux, objective.aux_coefficient)
        return Inputs(
            x,
            torch.full((), objective.sparsity, device=self.device),
            dead if sae.wants_dead else None,
            revive,
            objective.widths,
        )

    def _pass(self, inputs: Inputs, skips: bool) -> Outcome:
        for name, parameter in self.sae.named_parameters():
            parameter.grad = self.grads[name]
        return (
            skip_zeros.sparse_pass(self.sae, inputs, self.mm)
            if skips
            else PASSES[self.sae.architecture](self.sae, inputs, self.mm)
        )

    def _whole(self, inputs: Inputs, skips: bool, max_grad_norm: float) -> StepResult:
        outcome = self._pass(inputs, skips)
        finite = outcome.result.terms["loss"].isfinite()
        norm = self._update(finite, outcome.cut, max_grad_norm)
        return StepResult(*outcome.result, torch.where(finite, norm, torch.nan))

    def _update(self, go: Bool[Tensor, ""], cut: Tensor | None, max_grad_norm: float) -> Float[Tensor, ""]:
        """Clip, Adam and constraints where `go`; nothing moves otherwise. Returns the norm before clipping."""
        if self.project_gradient:
            W_dec, gradient = self.sae.W_dec, self.grads["W_dec"]
            unit = torch.nn.functional.normalize(W_dec, dim=1)
            gradient.sub_((gradient * unit).sum(dim=1, keepdim=True) * unit)
        norm = torch.nn.utils.get_total_norm(list(self.grads.values()))
        # torch.nn.utils.clip_grad_norm_, with the division left to Adam
        too_long = ((norm + 1e-6) / max_grad_norm).clamp_min(1.0)
        if self.fuses:
            skip_zeros.adam(self.sae, self.optimizer, self.lr, too_long, go)
        else:
            with self._device_scalars(too_long, (~go).float()):
                self.optimizer.step()
            norms = self.sae.W_dec.norm(dim=1, keepdim=True).clamp_min(MIN_DECODER_NORM)
            self.sae.W_dec.div_(torch.where(go, norms, 1.0))
        if isinstance(self.sae, JumpReLUSAE):
            self.sae.threshold.clamp_min_(0.0)
        if isinstance(self.sae, BatchSelecting) and cut is not None:
            rate = torch.where(go & cut.isfinite(), CUT_RATE, 0.0)
            self.sae.cut_mean.mul_(1 - rate).add_(torch.where(rate > 0, rate * cut, 0.0))
            self.sae.cut_weight.mul_(1 - rate).add_(rate)
        return norm

    @contextlib.contextmanager
    def _device_scalars(self, too_long: Tensor, skip: Tensor) -> Iterator[None]:
        """The optimizer with its scalars on the device, as long as it takes: saved states hold plain numbers.

        `grad_scale` and `found_inf` are what torch's GradScaler gives a fused optimizer: gradients are divided by the
        one, and the other, where it is 1, holds weights, moments and step counts as they are.
        """
        groups, optimizer = self.optimizer.param_groups, self.optimizer
        before = [(group["lr"], group["capturable"]) for group in groups]
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        for group in groups:
            group["lr"], group["capturable"] = self.lr, capturing
        optimizer.grad_scale, optimizer.found_inf = too_long, skip  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
            for group, (lr, capturable) in zip(groups, before, strict=True):
                group["lr"], group["capturable"] = lr, capturable

    def _capture(self, inputs: Inputs, skips: bool, max_grad_norm: float) -> "_Captured":
        """The step as a graph over copies of `inputs`. Capturing computes nothing."""
        held = _copies(inputs)
        if self.pool is None:  # one for all graphs: they never run at the same time, and results are copied out
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = self._whole(held, skips, max_grad_norm)
        return _Captured(graph.replay, held, result)


class _Captured:
    """A captured step, its inputs and its outputs; the next replay overwrites them."""

    def __init__(self, launch: Callable[[], None], inputs: Inputs, result: StepResult):
        self.launch, self.inputs, self.result = launch, inputs, result

    def replay(self, inputs: Inputs) -> StepResult:
        for held, given in zip(_tensors(self.inputs), _tensors(inputs), strict=True):
            held.copy_(given)
        self.launch()
        terms, n_active, fire_counts, norm = self.result
        numbers = torch.stack([*terms.values(), norm])
        return StepResult(dict(zip(terms, numbers, strict=False)), n_active.clone(), fire_counts.clone(), numbers[-1])


def _tensors(inputs: Inputs) -> list[Tensor]:
    held = [inputs.x, inputs.sparsity]
    if inputs.dead is not None:
        held.append(inputs.dead)
    if inputs.revive is not None:
        held += [inputs.revive.latents, inputs.revive.valid]
    return held


def _copies(inputs: Inputs) -> Inputs:
    revive = inputs.revive
    return Inputs(
        inputs.x.clone(),
        inputs.sparsity.clone(),
        None if inputs.dead is None else inputs.dead.clone(),
        None if revive is None else revive._replace(latents=revive.latents.clone(), valid=revive.valid.clone()),
        inputs.widths,
    )


def _structure(inputs: Inputs) -> tuple[object, ...]:
    """What a graph is fixed to: everything but the tensors' values."""
    aux = (
        None if inputs.revive is None else (len(inputs.revive.latents), inputs.revive.k_aux, inputs.revive.coefficient)
    )
    return inputs.x.shape, inputs.x.dtype, inputs.dead is not None, aux, inputs.widths
