"""Buffers of the sparse kernel for batches of one size, and the stages that fill them."""

import math

import numpy as np
import torch
from torch import Tensor

from mechint.kernels.cpu import choice, loops
from mechint.kernels.cpu.vector import LANES
from mechint.kernels.threads import Pool
from mechint.sae import SAE

LATENTS = 256  # a unit of work over latents
PARTS = 4  # units of work over the latents of one slice
NOTHING = np.zeros(0, np.float32)
_NO_BITS, _NO_ROWS = np.zeros((0, 0), np.uint16), np.zeros((0, 0), np.float32)


class Space:
    """One batch on its way through the stages. Arrays named by entry hold chunk c's at `span(c)[0]` and after."""

    def __init__(self, sae: SAE, batch: int, *, narrow: bool, dense_above: float, n_threads: int, n_prefixes: int = 1):
        d_in, d_sae = sae.d_in, sae.d_sae
        self.batch, self.d_in, self.d_sae, self.narrow = batch, d_in, d_sae, narrow
        self.width = -(-d_in // 64) * 64
        self.n_slices = self.width // 64
        self.chunk = chunk_rows(d_sae)
        self.n_chunks = -(-batch // self.chunk)
        self.n_blocks = -(-d_sae // LATENTS)
        self.dense_above, self.n_threads = dense_above, n_threads
        kind = torch.bfloat16 if narrow else torch.float32
        # a few rows more between slices, so that rows of different slices do not compete for the same cache lines
        self.x_slices = _zeros(self.n_slices, batch + 8, 64)
        self.g_slices = _aligned(n_prefixes, self.n_slices, batch + 8, 64)
        self.W_kind = torch.empty(d_sae, d_in, dtype=kind) if narrow else None
        self.x_kind = [torch.empty(self.chunk, d_in, dtype=kind) for _ in range(n_threads)]
        self.out = [torch.empty(self.chunk, d_sae, dtype=kind) for _ in range(n_threads)]
        self.lines = [_zeros(self.chunk, self.width) for _ in range(n_threads)]
        self.norms, self.biases, self.bound = (np.zeros(d_sae, np.float32) for _ in range(3))
        self.worst_of = np.zeros(self.n_blocks, np.float32)
        self.errors = np.zeros(batch, np.float32)
        self.capacity = int(dense_above * self.chunk * d_sae) + d_sae + LANES
        # untouched parts of these take no memory
        self.cols = np.empty(self.n_chunks * self.capacity, np.int32)
        self.pre, self.grad = (np.empty(self.n_chunks * self.capacity, np.float32) for _ in range(2))
        self.acts, self.by_gate = self.pre, NOTHING
        self.ends = np.zeros(batch, np.int64)
        self.n_entries = np.zeros(self.n_chunks, np.int64)
        self.counts = np.zeros((self.n_chunks, d_sae), np.int32)
        self.starts = np.zeros(d_sae + 1, np.int64)
        self.records, self.coefs = np.empty((0, 4), np.int32), np.empty((0, 4), np.float32)
        self.squares = np.zeros((self.n_chunks, n_prefixes))
        self.row_sums = _zeros(self.n_chunks, self.n_slices, 64)
        self.partial = _zeros(self.n_blocks, d_in)
        # by chunk and latent, where feature_acts are not the pre-activations
        self.fired_of, self.own, self.moment = np.zeros((0, 0), np.int32), _zeros(0, 0), _zeros(0, 0)

    def separate_acts(self, *, by_gate: bool = False) -> None:
        """For architectures whose feature_acts are not the pre-activations, and that have one more gradient."""
        if self.acts is self.pre:
            self.acts = np.empty_like(self.pre)
            self.by_gate = np.empty_like(self.pre) if by_gate else NOTHING
            self.fired_of = np.zeros_like(self.counts)
            self.own, self.moment = (_zeros(self.n_chunks, self.d_sae) for _ in range(2))

    def start(self, sae: SAE, x: Tensor, threads: Pool) -> bool:
        """Take in a batch and the weights of now. False where a weight is not finite."""
        self.x = x.numpy()
        self.W_enc_tensor = sae.W_enc.detach().t()
        self.W_enc_short, self.W_dec = self.W_enc_tensor.numpy(), sae.W_dec.detach().numpy()
        self.W_enc = self.W_enc_short
        if self.width != self.d_in:
            self.W_enc, self.W_dec = (_padded(weight, self.width) for weight in (self.W_enc, self.W_dec))
        self.b_enc = sae.get_parameter(sae.latent_offsets()[0]).detach().numpy()
        self.b_dec = sae.b_dec.detach().numpy()
        self.too_dense, self.finite = False, True
        threads.run(self._measure, self.n_blocks)
        self.worst = self.worst_of.max()
        self.set_bound(0.0)
        return bool(np.isfinite(self.worst))

    def set_bound(self, bound: np.ndarray | float) -> None:
        """Entries are those with a pre-activation above this."""
        self.bound[:] = bound
        # a little high, for the rounding of this very difference
        slack = np.float32(1e-6) * (np.abs(self.b_enc) + np.abs(self.bound))
        self.biases[:] = self.b_enc - self.bound + slack

    def rows(self, c: int) -> tuple[int, int]:
        return c * self.chunk, min((c + 1) * self.chunk, self.batch)

    def span(self, c: int) -> tuple[int, int]:
        return c * self.capacity, (c + 1) * self.capacity

    def _measure(self, b: int, thread: int) -> None:
        first, last = LATENTS * b, min(LATENTS * (b + 1), self.d_sae)
        narrow = as_numpy(self.W_kind) if self.W_kind is not None else _NO_BITS
        self.worst_of[b] = loops.measure_latents(
            self.W_enc_short, self.b_enc, self.narrow, first, last, narrow, self.norms
        )

    def encode(self, c: int, thread: int) -> bool:
        """The encoder product of a chunk into `out[thread]`, without the bias. False if x is not finite."""
        first, last = self.rows(c)
        rows = self.x_kind[thread]
        bits, wide = (as_numpy(rows), _NO_ROWS) if self.narrow else (_NO_BITS, as_numpy(rows))
        if not loops.prepare_rows(
            self.x, self.b_dec, self.narrow, first, last, bits, wide, self.x_slices, self.errors, self.worst
        ):
            self.finite = False
            return False
        n, out = last - first, self.out[thread]
        if self.W_kind is not None:
            torch.mm(rows[:n], self.W_kind.t(), out=out[:n])
        else:
            product(rows[:n], self.W_enc_tensor, out[:n])
        return True

    def find(self, c: int, thread: int, k: int = 0) -> bool:
        """Entries above `bound`, or with `k` among the k largest of their row. False where there are too many."""
        values = as_numpy(self.out[thread])
        source = (values, self.narrow, *self.rows(c), self.x_slices, self.W_enc, self.b_enc)
        target = (self.biases, self.norms, self.errors)
        place = (*self.span(c), self.cols, self.pre, self.ends)
        if k:
            n = choice.find_top(*source, *target, k, *place)
        else:
            n = loops.find_above(*source, self.bound, *target, self.lines[thread], *place)
        self.n_entries[c] = n
        self.too_dense = self.too_dense or n < 0
        return n >= 0

    def decode(self, c: int, thread: int) -> None:
        """Reconstruct from `acts`: squared errors, gradients of x_hat (slices) and of acts (`grad`)."""
        first, last = self.rows(c)
        entries = (self.span(c)[0], self.cols, self.acts, self.ends)
        self.squares[c, 0] = loops.decode_rows(
            self.x, self.b_dec, self.W_dec, first, last, self.lines[thread], *entries, self.g_slices[0], self.grad
        )
        loops.column_sums(self.g_slices[0], first, last, self.row_sums[c])

    def decode_gate(self, c: int, thread: int) -> float:
        """`decode`, and the same from `pre`, decoder held constant: its gradients into `by_gate`, its sum of squared
        errors returned."""
        first, last = self.rows(c)
        entries = (self.span(c)[0], self.cols, self.acts, self.pre, self.ends)
        place = (self.lines[thread], *entries, self.g_slices[0], self.grad, self.by_gate)
        self.squares[c, 0], error = loops.decode_twice(self.x, self.b_dec, self.W_dec, first, last, *place)
        loops.column_sums(self.g_slices[0], first, last, self.row_sums[c])
        return float(error)

    def decode_nested(self, c: int, widths: np.ndarray) -> None:
        first, last = self.rows(c)
        entries = (self.span(c)[0], self.cols, self.acts, self.ends, widths)
        choice.decode_nested(
            self.x, self.b_dec, self.W_dec, first, last, *entries, self.g_slices, self.grad, self.squares[c]
        )
        loops.column_sums(self.g_slices[0], first, last, self.row_sums[c])

    def residual(self) -> Tensor:
        """x - x_hat, from the gradient of the reconstruction (the widest, where prefixes are nested)."""
        rows = torch.from_numpy(self.g_slices[-1][:, : self.batch]).permute(1, 0, 2).reshape(self.batch, -1)
        return rows[:, : self.d_in] * (-0.5 * self.batch * self.d_in * len(self.g_slices))

    def sort(self, threads: Pool) -> None:
        """Entries by latent into `records`; needs `counts`, which it uses up."""
        loops.place_entries(self.counts, self.starts)
        n = int(self.starts[-1])
        if len(self.records) < n:
            self.records = np.empty((n + n // 4, 4), np.int32)
            self.coefs = self.records.view(np.float32)
        threads.run(self._scatter, self.n_chunks)

    def _scatter(self, c: int, thread: int) -> None:
        entries = (self.span(c)[0], self.cols, self.acts, self.grad, self.ends)
        loops.scatter_entries(*self.rows(c), *entries, self.counts[c], self.records, self.coefs)

    def weights(self, grads: dict[str, Tensor], bias: str, widths: tuple[int, ...], threads: Pool) -> float:
        """Gradients of W_enc, W_dec, the encoder's bias and b_dec from the records. Returns their sum of squares."""
        dW_enc, dW_dec, db = grads["W_enc"].t().numpy(), grads["W_dec"].numpy(), grads[bias].numpy()
        # (which gradient, slice, first and last latent, prefix); neighbours share a slice
        edges = sorted({0, *widths, *(self.d_sae * part // PARTS for part in range(PARTS + 1))})
        spans = [(a, b, sum(a >= w for w in widths[:-1])) for a, b in zip(edges, edges[1:], strict=False)]
        units = [(0, s, *span) for s in range(self.n_slices) for span in sorted(spans, key=lambda span: span[2])]
        units += [(1, s, a, b, 0) for s in range(self.n_slices) for a, b, _ in spans]
        squares, bias_squares = np.zeros(len(units)), np.zeros(self.n_blocks)

        def latents(item: int, thread: int) -> None:
            if item < len(units):
                which, s, first, last, prefix = units[item]
                slices, out = (self.x_slices, dW_enc) if which else (self.g_slices[prefix], dW_dec)
                squares[item] = loops.weight_gradient(slices, s, first, last, self.starts, self.records, 1 + which, out)
            else:
                b = item - len(units)
                first, last = LATENTS * b, min(LATENTS * (b + 1), self.d_sae)
                bias_squares[b] = loops.bias_gradient(
                    self.W_enc, first, last, self.starts, self.coefs, db, self.partial[b]
                )

        threads.run(latents, len(units) + self.n_blocks)
        self.fired = np.diff(self.starts) if self.acts is self.pre else self.fired_of.sum(axis=0, dtype=np.int64)
        self.other_sums, self.moments = (part.sum(axis=0, dtype=np.float64) for part in (self.own, self.moment))
        by_rows = self.row_sums.sum(axis=0, dtype=np.float64).reshape(-1)[: self.d_in]
        db_dec = by_rows - self.partial.sum(axis=0, dtype=np.float64)
        grads["b_dec"].copy_(torch.from_numpy(db_dec))
        return float(squares.sum() + bias_squares.sum() + (db_dec**2).sum())


def chunk_rows(d_sae: int) -> int:
    """Rows of a chunk: 256, at which the product is fastest (oneDNN lays the weights out anew for every chunk), fewer
    where its result would take more than 32 MB a thread. Depends on the dictionary alone: sums over chunks must not
    change with the machine."""
    return max(64, min(256, 2**24 // d_sae // 16 * 16))


def product(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """`x @ weight.T` in float32, through oneDNN where torch has it (mechint.models.matmul says why)."""
    try:
        out.copy_(torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], ""))
    except (AttributeError, RuntimeError, NotImplementedError):
        torch.mm(x, weight.t(), out=out)


def as_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as numpy sees it; bfloat16 as its bits."""
    return tensor.view(torch.int16).numpy().view(np.uint16) if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _aligned(*shape: int) -> np.ndarray:
    """Zeros at an address that is a multiple of 64 bytes."""
    n = math.prod(shape)
    room = _zeros(n + 16)
    first = -room.ctypes.data % 64 // 4
    return room[first : first + n].reshape(shape)


def _padded(weight: np.ndarray, width: int) -> np.ndarray:
    out = _zeros(len(weight), width)
    out[:, : weight.shape[1]] = weight
    return out
