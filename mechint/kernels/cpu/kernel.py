"""Training steps on a CPU that skip the zeros: one dense encoder product, then only the active entries.

    chunks of rows    encoder product, active entries, reconstruction, gradients of the active entries
    sort              the entries by latent
    latents           gradients of encoder column, decoder row and bias, from the rows on which the latent is active
    update            clip by total norm, Adam, decoder rows back to unit norm, in one pass over the weights

On processors with bfloat16 products the encoder product is done in bfloat16 with a proven bound on its error; every
entry that may be active is computed again in float32, so that the result is float32's. A batch on which more than
`DENSE_ABOVE` of a chunk's entries are active is done densely; that is decided from the batch itself, so it needs no
state and resuming cannot change it.

Sums have a fixed order: the same batch gives the same bits, for any number of threads.
"""

import copy
import functools
import math
import threading
from pathlib import Path
from typing import Any, final
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.kernels.contract import Pass, StepResult, StepSettings
from mechint.kernels.cpu.adam import adam_update, is_plain_adam
from mechint.kernels.cpu.dead import DeadRoom, add_dead
from mechint.kernels.cpu.dense_route import KINDS, DenseRoute, gain_of
from mechint.kernels.cpu.plans import PLANS, widths_of
from mechint.kernels.cpu.space import Space
from mechint.kernels.dense import DenseKernel
from mechint.kernels.threads import Pool, pool
from mechint.sae import SAE, Objective, build_sae

# Share of active entries from which dense products are faster (docs/performance.md, "Where dense wins").
DENSE_ABOVE = 0.17


def misfit(sae: SAE, optimizer: torch.optim.Optimizer) -> str | None:
    """Why this kernel cannot train that SAE with that optimizer; None where it can."""
    if sae.architecture not in PLANS:
        return f"architecture {sae.architecture} has no sparse step"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in sae.parameters()):
        return "its parameters are not all float32 on a CPU"
    if not sae.W_enc.t().is_contiguous() or not sae.W_dec.is_contiguous():
        return "its weights are not laid out latent by latent"
    if sae.d_sae < 16:
        return "it has fewer than 16 latents"
    if sae.peers.several_shares:
        return "its latents are split over several processes"
    if not sae.unit_decoder:
        return "its decoder rows are free"
    if not is_plain_adam(optimizer):
        return "the optimizer is not plain Adam"
    return None


@final
class SparseKernel:
    """See the module. Equals `DenseKernel` to float32 rounding; `misfit` says which SAEs it cannot train.

    `narrow` says whether bfloat16 proposes the entries (default: where the processor is fast at it).
    """

    name = "sparse"

    def __init__(
        self,
        sae: SAE,
        optimizer: torch.optim.Optimizer,
        *,
        project_gradient: bool = False,
        narrow: bool | None = None,
        dense_above: float = DENSE_ABOVE,
    ):
        reason = misfit(sae, optimizer)
        assert reason is None, reason
        self.sae, self.optimizer, self.project_gradient = sae, optimizer, project_gradient
        self.narrow = has_bfloat16_products() if narrow is None else narrow
        self.dense_above = dense_above
        self.dense = DenseKernel(sae, optimizer, project_gradient=project_gradient)
        self.route = ""  # of the last batch: "sparse" or "dense"
        self._space: Space | None = None  # held so that they stay
        self._dense: DenseRoute | None = None
        self._dead = DeadRoom()
        self._memory: dict[str, float] = {}  # hints; results do not depend on them
        self._grads = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
        self._squares: float | None = None  # of all gradients, where the last backward knows it

    def backward(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Pass:
        x = x.detach().contiguous()
        with torch.no_grad():
            return self._backward(x, objective, pool())

    def update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        self._squares = None  # other processes' gradients may have come in
        return self._update(lr, max_grad_norm)

    def step(self, x: Float[Tensor, "batch d_in"], settings: StepSettings) -> StepResult:
        result = self.backward(x, settings.objective)
        if not torch.isfinite(result.terms["loss"]):
            return StepResult(*result, torch.full_like(result.terms["loss"], torch.nan))
        return StepResult(*result, self._update(settings.lr, settings.max_grad_norm))

    def _update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        if self.project_gradient or not is_plain_adam(self.optimizer):
            return self.dense.update(lr, max_grad_norm)
        return adam_update(self.sae, self.optimizer, lr, max_grad_norm, self._squares, pool())

    def _backward(self, x: Tensor, objective: Objective, threads: Pool) -> Pass:
        sae, batch = self.sae, len(x)
        self.route, self._squares = "sparse", None
        widths = widths_of(sae, objective)
        space = self._space_for(batch, len(widths), threads)
        finite = space.start(sae, x, threads)
        terms = PLANS[sae.architecture](sae, objective, space, threads, self._memory) if finite else None
        if terms is not None:
            space.sort(threads)
            self._squares = space.weights(self._grads, sae.latent_offsets()[0], widths, threads)
            fired = torch.from_numpy(space.fired)
            source = space
        else:  # too dense, or not finite
            self.route = "dense"
            if sae.architecture not in KINDS:
                with torch.enable_grad():
                    return self.dense.backward(x, objective)
            source = self._dense_route(batch, threads)
            terms, fired = source.backward(sae, x, objective, self._grads, threads)
        self._other_gradients(source)
        for name, parameter in sae.named_parameters():
            parameter.grad = self._grads[name]
        loss = sum(value * weight for value, weight in terms.values())
        values = {"loss": loss, **{name: value for name, (value, _) in terms.items()}}
        extra = self._of_dead(x, objective, source, threads) if math.isfinite(loss) else {}
        for name, (value, weight) in extra.items():
            values[name] = value
            values["loss"] += weight * value
        tensors = {name: torch.tensor(float(value), dtype=torch.float32) for name, value in values.items()}
        return Pass(tensors, fired.sum(), fired)

    def _other_gradients(self, source: Space | DenseRoute) -> None:
        """Of the parameters that only some architectures have, from the sums over each latent's entries."""
        own, moment = torch.from_numpy(source.other_sums), torch.from_numpy(source.moments)
        if self.sae.architecture == "jumprelu":
            self._grads["threshold"].copy_(own)
            self._add_squares("threshold")
        elif self.sae.architecture == "gated":
            # du = dgate + gain * dmag; where dmag is not 0, act = u * gain + b_mag
            mag, gain = self.sae.get_parameter("b_mag"), torch.from_numpy(gain_of(self.sae))
            self._add_squares("b_gate", -1)
            self._grads["b_gate"].sub_(own * gain)
            self._grads["b_mag"].copy_(own)
            self._grads["r_mag"].copy_(moment - mag * own)
            for name in ("b_gate", "b_mag", "r_mag"):
                self._add_squares(name)

    def _add_squares(self, name: str, sign: int = 1) -> None:
        if self._squares is not None:
            self._squares += sign * self._grads[name].double().square().sum().item()

    def _of_dead(
        self, x: Tensor, objective: Objective, source: Space | DenseRoute, threads: Pool
    ) -> dict[str, tuple[float, float]]:
        """Terms over the dead latents alone; adds to the gradients."""
        if objective.dead is None:
            return {}
        with_auxk = bool(objective.aux_coefficient and objective.k_aux and objective.dead.any())
        if not (with_auxk or getattr(self.sae, "pre_act_coefficient", 0.0)):
            return {}
        self._squares = None
        residual = source.residual() if with_auxk else None
        return add_dead(self.sae, x, objective, residual, self._grads, self._dead, threads)

    def _dense_route(self, batch: int, threads: Pool) -> DenseRoute:
        key = self._key(batch, threads)
        route = _DENSE_ROUTES.get(key)
        if route is None:
            route = _DENSE_ROUTES[key] = DenseRoute(self.sae, batch, threads.n_threads)
        self._dense = route
        return route

    def _key(self, batch: int, threads: Pool) -> tuple[Any, ...]:
        sae = self.sae
        return threading.get_ident(), sae.architecture, sae.d_in, sae.d_sae, batch, threads.n_threads

    def _space_for(self, batch: int, n_prefixes: int, threads: Pool) -> Space:
        key = (*self._key(batch, threads), n_prefixes, self.narrow, self.dense_above)
        space = _SPACES.get(key)
        if space is None:
            space = _SPACES[key] = Space(
                self.sae,
                batch,
                narrow=self.narrow,
                dense_above=self.dense_above,
                n_threads=threads.n_threads,
                n_prefixes=n_prefixes,
            )
        self._space = space
        return space


# Buffers hold nothing from step to step: the kernels of a sweep share them, as long as one is alive.
_SPACES: WeakValueDictionary[tuple[Any, ...], Space] = WeakValueDictionary()
_DENSE_ROUTES: WeakValueDictionary[tuple[Any, ...], DenseRoute] = WeakValueDictionary()


@functools.cache
def broken(architecture: str) -> str | None:
    """Why the kernel does not work for an architecture on this machine; None where a small step agrees with the
    reference. Compiles the loops, which takes some seconds the first time and is kept on disk."""
    options = {"k": 4} if "topk" in architecture else {}
    try:
        sae = build_sae(architecture, 64, 128, generator=torch.Generator().manual_seed(0), options=options)
        reference = copy.deepcopy(sae)
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
        settings = StepSettings(1e-3, 1.0, Objective(sparsity=0.1))
        got, expected = (
            kernel.step(x, settings)
            for kernel in (
                SparseKernel(sae, torch.optim.Adam(sae.parameters()), dense_above=1.0),
                DenseKernel(reference, torch.optim.Adam(reference.parameters())),
            )
        )
        for one, other in ((got.terms["loss"], expected.terms["loss"]), (got.grad_norm, expected.grad_norm)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    except Exception as error:  # whatever a compiler may say
        return f"it does not work here ({type(error).__name__}: {str(error).strip().splitlines()[0][:200]})"
    return None


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 at least twice as fast as float32. Known from its flags, on Linux
    only, and never measured: a rerun takes the same path."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "").split()
    return "avx512_bf16" in flags or "amx_bf16" in flags
