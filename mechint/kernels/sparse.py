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

import functools
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechint.kernels import sparse_loops as loops
from mechint.kernels.contract import Pass, StepResult, StepSettings
from mechint.kernels.dense import DenseKernel
from mechint.kernels.sparse_pool import pool
from mechint.sae import SAE, Objective

# Share of active entries from which dense products are faster (docs/performance.md, "Where dense wins").
DENSE_ABOVE = 0.17
LATENTS = 256  # a unit of work over latents


def misfit(sae: SAE, optimizer: torch.optim.Optimizer) -> str | None:
    """Why this kernel cannot train that SAE with that optimizer; None where it can."""
    if sae.architecture not in ("standard",):
        return f"architecture {sae.architecture} has no sparse step"
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in sae.parameters()):
        return "its parameters are not all float32 on a CPU"
    if sae.d_sae < 16 or not sae.W_enc.t().is_contiguous() or not sae.W_dec.is_contiguous():
        return "its weights are too few or not laid out latent by latent"
    if not sae.unit_decoder:
        return "its decoder rows are free"
    if not _plain_adam(optimizer):
        return "the optimizer is not plain Adam"
    return None


@final
class SparseKernel:
    """See the module. Equals `DenseKernel` to float32 rounding; `misfit` says which SAEs it cannot train."""

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
        self._space: _Workspace | None = None
        self._grads = {name: torch.zeros_like(p) for name, p in sae.named_parameters()}
        self._squares: float | None = None  # of all gradients, known from the last backward

    def backward(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Pass:
        x = x.detach().contiguous()
        result = self._sparse(x, objective)
        if result is None:
            self.route = "dense"
            self._squares = None
            return self.dense.backward(x, objective)
        self.route = "sparse"
        return result

    def update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        self._squares = None
        return self._update(lr, max_grad_norm)

    def step(self, x: Float[Tensor, "batch d_in"], settings: StepSettings) -> StepResult:
        result = self.backward(x, settings.objective)
        if not torch.isfinite(result.terms["loss"]):
            return StepResult(*result, torch.full_like(result.terms["loss"], torch.nan))
        return StepResult(*result, self._update(settings.lr, settings.max_grad_norm))

    # --- gradients ----------------------------------------------------------------------------------------------------

    def _sparse(self, x: Tensor, objective: Objective) -> Pass | None:
        """None where the batch is too dense."""
        space = self._workspace(len(x))
        space.load(self.sae)
        threads = pool()
        space.reset()
        threads.run(space.measure, space.n_blocks)
        worst = space.worst.max()
        if not np.isfinite(worst):
            return self._not_finite()
        xs = x.numpy()
        l1 = np.float32(objective.sparsity / (len(x) * self.sae.d_sae))

        def chunk(c: int, thread: int) -> None:
            if space.too_dense:
                return
            first, last = space.rows(c)
            if not space.encode(xs, c, thread, worst):
                space.finite = False
                return
            base, limit = space.span(c)
            n = loops.find_above(
                space.values[thread],
                self.narrow,
                first,
                last,
                space.x_slices,
                space.W_enc,
                space.b_enc,
                space.bound,
                space.biases,
                space.norms,
                space.errors,
                base,
                limit,
                space.cols,
                space.pre,
                space.ends,
            )
            if n < 0:
                space.too_dense = True
                return
            space.n_entries[c] = n
            space.decode(xs, c, space.pre)
            space.sums[c, 1] = loops.finish_relu(base, n, space.cols, space.pre, space.grad, l1, space.counts[c])

        threads.run(chunk, space.n_chunks)
        if not space.finite:
            return self._not_finite()
        if space.too_dense:
            return None
        fire_counts = torch.from_numpy(space.counts.sum(axis=0, dtype=np.int64))
        self._weights(threads, space)
        n_in, n_latents = x.numel(), len(x) * self.sae.d_sae
        mse = space.sums[:, 0].sum() / n_in
        l1_term = space.sums[:, 1].sum() / n_latents
        terms = {"loss": mse + objective.sparsity * l1_term, "mse": mse, "l1": l1_term}
        n_active = torch.tensor(int(space.n_entries.sum()))
        return Pass(
            {name: torch.tensor(value, dtype=torch.float32) for name, value in terms.items()}, n_active, fire_counts
        )

    def _weights(self, threads: Any, space: "_Workspace") -> None:
        """Gradients of all parameters from the entries, into `.grad`."""
        grads = self._grads
        dW_enc, dW_dec, db_enc = grads["W_enc"].t().numpy(), grads["W_dec"].numpy(), grads["b_enc"].numpy()
        loops.place_entries(space.counts, space.starts)
        space.reserve(int(space.starts[-1]))
        threads.run(space.scatter, space.n_chunks)
        d_sae, n_slices, parts = self.sae.d_sae, space.n_slices, 4
        squares = np.zeros((2, n_slices, parts))
        bias_squares = np.zeros(space.n_blocks)

        def latents(item: int, thread: int) -> None:
            if item < squares.size:
                which, s, part = np.unravel_index(item, squares.shape)
                first, last = d_sae * part // parts, d_sae * (part + 1) // parts
                slices, out = (space.x_slices, dW_enc) if which else (space.g_slices, dW_dec)
                squares[which, s, part] = loops.weight_gradient(
                    slices, s, first, last, space.starts, space.records, 1 + which, out
                )
            else:
                b = item - squares.size
                first, last = LATENTS * b, min(LATENTS * (b + 1), d_sae)
                bias_squares[b] = loops.bias_gradient(
                    space.W_enc, first, last, space.starts, space.coefs, db_enc, space.partial[b]
                )

        threads.run(latents, squares.size + space.n_blocks)
        rows = space.row_sums.sum(axis=0, dtype=np.float64).reshape(-1)[: self.sae.d_in]
        db_dec = rows - space.partial.sum(axis=0, dtype=np.float64)[: self.sae.d_in]
        grads["b_dec"].copy_(torch.from_numpy(db_dec))
        self._squares = float(squares.sum() + bias_squares.sum() + (db_dec**2).sum())
        for name, parameter in self.sae.named_parameters():
            parameter.grad = grads[name]

    def _not_finite(self) -> Pass:
        nan = torch.tensor(torch.nan)
        self.route, self._squares = "sparse", None
        names = ("loss", "mse", "l1")
        return Pass(dict.fromkeys(names, nan), torch.tensor(0), torch.zeros(self.sae.d_sae, dtype=torch.int64))

    def _workspace(self, batch: int) -> "_Workspace":
        if self._space is None or self._space.batch != batch:
            self._space = _Workspace(batch, self.sae.d_in, self.sae.d_sae, self.narrow, self.dense_above)
        return self._space

    # --- update -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        if self.project_gradient or not _plain_adam(self.optimizer):
            return self.dense.update(lr, max_grad_norm)
        parameters = dict(self.sae.named_parameters())
        if self._squares is None:
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        else:
            norm = torch.tensor(self._squares, dtype=torch.float64).sqrt().float()
        clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0).item()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        jobs = [job for p in parameters.values() if p.grad is not None for job in self._adam_jobs(p, lr, clip)]

        def adam(item: int, thread: int) -> None:
            loops.adam_rows(*jobs[item])

        pool().run(adam, len(jobs))
        if not self.sae.unit_decoder or type(self.sae).constrain is not SAE.constrain:
            self.sae.constrain()
        return norm

    def _adam_jobs(self, parameter: torch.nn.Parameter, lr: float, clip: float) -> list[tuple[Any, ...]]:
        group = next(g for g in self.optimizer.param_groups if any(parameter is p for p in g["params"]))
        beta1, beta2 = group["betas"]
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        t = state["step"].item()
        is_encoder = parameter is self.sae.W_enc
        for key in ("exp_avg", "exp_avg_sq"):
            if state[key].stride() != parameter.stride():  # as read back from a file
                state[key] = torch.empty_like(parameter).copy_(state[key])
        tensors = [parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"]]
        if tensors[1].stride() != parameter.stride():
            tensors[1] = torch.empty_like(parameter).copy_(tensors[1])
        arrays = [(v.t() if is_encoder else v.reshape(-1, v.shape[-1])).numpy() for v in tensors]
        scalars = (clip, beta1, beta2, group["eps"], lr / (1 - beta1**t), (1 - beta2**t) ** 0.5)
        least = np.float32(1e-12)
        unit = parameter is self.sae.W_dec and self.sae.unit_decoder
        rows = arrays[0].shape[0]
        return [
            (*arrays, first, min(first + LATENTS, rows), *map(np.float32, scalars), unit, least)
            for first in range(0, rows, LATENTS)
        ]


class _Workspace:
    """Buffers for batches of one size, and the stages that fill them."""

    def __init__(self, batch: int, d_in: int, d_sae: int, narrow: bool, dense_above: float):
        self.batch, self.d_in, self.d_sae, self.narrow = batch, d_in, d_sae, narrow
        self.width = -(-d_in // 64) * 64
        self.n_slices = self.width // 64
        self.chunk = chunk_rows(d_sae)
        self.n_chunks = -(-batch // self.chunk)
        self.n_blocks = -(-d_sae // LATENTS)
        n_threads = pool().n_threads
        kind = torch.bfloat16 if narrow else torch.float32
        # one more block between slices, so that rows of different slices do not compete for the same cache lines
        self.x_slices, self.g_slices = (np.zeros((self.n_slices, batch + 8, 64), np.float32) for _ in range(2))
        self.W_kind = torch.empty(d_sae, d_in, dtype=kind) if narrow else None
        self.x_kind = [torch.empty(self.chunk, d_in, dtype=kind) for _ in range(n_threads)]
        self.out = [torch.empty(self.chunk, d_sae, dtype=kind) for _ in range(n_threads)]
        self.values = [_numpy(out) for out in self.out]
        self.norms, self.biases, self.bound = (np.zeros(d_sae, np.float32) for _ in range(3))
        self.worst = np.zeros(self.n_blocks, np.float32)
        self.errors = np.zeros(batch, np.float32)
        self.capacity = int(dense_above * self.chunk * d_sae) + d_sae
        self.cols = np.empty(self.n_chunks * self.capacity, np.int32)
        self.pre, self.grad = (np.empty(self.n_chunks * self.capacity, np.float32) for _ in range(2))
        self.ends = np.zeros(batch, np.int64)
        self.n_entries = np.zeros(self.n_chunks, np.int64)
        self.counts = np.zeros((self.n_chunks, d_sae), np.int32)
        self.starts = np.zeros(d_sae + 1, np.int64)
        self.sums = np.zeros((self.n_chunks, 2))
        self.row_sums = np.zeros((self.n_chunks, self.n_slices, 64), np.float32)
        self.partial = np.zeros((self.n_blocks, d_in), np.float32)
        self.records = np.empty((0, 4), np.int32)

    def load(self, sae: SAE) -> None:
        """The weights as arrays; rows that are not a multiple of 64 long are copied with zeros behind them."""
        self.W_enc, self.W_dec = sae.W_enc.detach().t().numpy(), sae.W_dec.detach().numpy()
        self.W_enc_short = self.W_enc
        self.W_enc_tensor = sae.W_enc.detach().t()
        if self.width != self.d_in:
            self.W_enc, self.W_dec = (_padded(weight, self.width) for weight in (self.W_enc, self.W_dec))
        self.b_enc, self.b_dec = sae.get_parameter(sae.latent_offsets()[0]).detach().numpy(), sae.b_dec.detach().numpy()

    def reset(self) -> None:
        self.too_dense, self.finite = False, True

    def rows(self, c: int) -> tuple[int, int]:
        return c * self.chunk, min((c + 1) * self.chunk, self.batch)

    def span(self, c: int) -> tuple[int, int]:
        return c * self.capacity, (c + 1) * self.capacity

    def measure(self, b: int, thread: int) -> None:
        first, last = LATENTS * b, min(LATENTS * (b + 1), self.d_sae)
        narrow = _numpy(self.W_kind) if self.W_kind is not None else _NO_BITS
        self.worst[b] = loops.measure_latents(
            self.W_enc_short, self.narrow, first, last, narrow, self.norms, self.biases, self.b_enc, self.bound
        )

    def encode(self, x: np.ndarray, c: int, thread: int, worst: np.float32) -> bool:
        """The encoder product of a chunk into `values[thread]`, without the bias. False if x is not finite."""
        first, last = self.rows(c)
        rows = self.x_kind[thread]
        bits, wide = (_numpy(rows), _NO_ROWS) if self.narrow else (_NO_BITS, rows.numpy())
        finite = loops.prepare_rows(
            x, self.b_dec, self.narrow, first, last, bits, wide, self.x_slices, self.errors, worst
        )
        if finite:
            n, out = last - first, self.out[thread]
            if self.W_kind is not None:
                torch.mm(rows[:n], self.W_kind.t(), out=out[:n])
            else:
                out[:n] = torch.ops.mkldnn._linear_pointwise(rows[:n], self.W_enc_tensor, None, "none", [], "")
        return bool(finite)

    def decode(self, x: np.ndarray, c: int, acts: np.ndarray) -> None:
        first, last = self.rows(c)
        self.sums[c, 0] = loops.decode_rows(
            x,
            self.b_dec,
            self.W_dec,
            first,
            last,
            self.span(c)[0],
            self.cols,
            acts,
            self.ends,
            self.g_slices,
            self.grad,
        )
        loops.column_sums(self.g_slices, first, last, self.row_sums[c])

    def reserve(self, n: int) -> None:
        if len(self.records) < n:
            self.records = np.empty((n + n // 4, 4), np.int32)
        self.coefs = self.records.view(np.float32)

    def scatter(self, c: int, thread: int) -> None:
        first, last = self.rows(c)
        loops.scatter_entries(
            first,
            last,
            self.span(c)[0],
            self.cols,
            self.pre,
            self.grad,
            self.ends,
            self.counts[c],
            self.records,
            self.coefs,
        )


_NO_BITS = np.zeros((0, 0), np.uint16)
_NO_ROWS = np.zeros((0, 0), np.float32)


def chunk_rows(d_sae: int) -> int:
    """Rows of a chunk: enough for the product to be fast, few enough for it to stay in the cache. Depends on the
    dictionary alone: sums over chunks must not change with the machine."""
    return max(64, min(256, 2**21 // d_sae // 16 * 16))


def _numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as numpy sees it; bfloat16 as its bits."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _padded(weight: np.ndarray, width: int) -> np.ndarray:
    out = np.zeros((len(weight), width), np.float32)
    out[:, : weight.shape[1]] = weight
    return out


def _plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.Adam and not any(
        group["weight_decay"] or group["amsgrad"] or group["maximize"] for group in optimizer.param_groups
    )


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
