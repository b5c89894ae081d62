"""What this machine can do, and what a training step that skips the zeros costs at the least on it.

    float32   2 B d m / G32  +  28 bytes * parameters / S  +  4 B L0 d bytes * (3 / R + 1 / Q)
    bfloat16  2 B d m / G16  +  28 bytes * parameters / S  +  4 B L0 d bytes * (4 / R + 1 / Q)

B batch, d width, m latents. G32: the best float32 product rate measured (oneDNN or torch.mm, at the encoder's shape).
G16: that of bfloat16, for a step that finds candidates in bfloat16 and computes each anew in float32, which reads one
encoder column more per active latent. S: the stream rate, for Adam (reads p, g, m, v and writes p, m, v: 28 bytes a
parameter). R: the rate at which rows are gathered from a matrix in the last-level cache: x_hat reads W_dec, the two
weight gradients read x and the residual. Q: the same from the second-level cache: the gradient of f reads the rows of
W_dec that x_hat has just read. A Matryoshka SAE of P prefixes besides writes and reads a gradient of x_hat for each:
8 B d (P - 1) bytes / S. All rates are the best of all rounds; the limit is the lower of the two sums.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

NEAR_ROWS = 128  # rows that fit into a core's second-level cache


class Probe:
    """Measures the machine between the contenders' turns, so that a burst of other work shows."""

    def __init__(self, batch: int, d_in: int, d_sae: int, per_row: int = 64):
        generator = torch.Generator().manual_seed(0)
        self.batch, self.d_in, self.d_sae = batch, d_in, d_sae
        self.x = torch.randn(batch, d_in, generator=generator)
        self.W = torch.randn(d_sae, d_in, generator=generator)
        self.x16, self.W16 = self.x.bfloat16(), self.W.bfloat16()
        self.out, self.out16 = torch.empty(batch, d_sae), torch.empty(batch, d_sae, dtype=torch.bfloat16)
        self.source = torch.randn(2**25, generator=generator)  # 128 MB: beyond the cache
        self.target = torch.empty_like(self.source)
        self.far = torch.randint(0, d_sae, (batch, per_row), generator=generator)
        self.near = self.far % min(NEAR_ROWS, d_sae)
        self.read = row_reader() or self._embedding_bag
        self.seconds: dict[str, list[float]] = {}

    def run(self) -> None:
        with torch.no_grad():
            self._time("mm", lambda: torch.mm(self.x, self.W.t(), out=self.out))
            if torch.backends.mkldnn.is_available():
                self._time("onednn", self._onednn)
            self._time("bf16", lambda: torch.mm(self.x16, self.W16.t(), out=self.out16))
            self._time("stream", lambda: self.target.copy_(self.source))
            self._time("gather", lambda: self.read(self.x, self.W, self.far))
            self._time("near", lambda: self.read(self.x, self.W, self.near))

    def _onednn(self) -> None:
        # In chunks of rows, so that what the operator allocates stays in the cache instead of faulting in new pages.
        for part in self.x.split(256):
            torch.ops.mkldnn._linear_pointwise(part, self.W, None, "none", [], "")

    def _embedding_bag(self, x: torch.Tensor, W: torch.Tensor, picked: torch.Tensor) -> None:
        for part in picked.split(256):
            torch.nn.functional.embedding_bag(part, W, mode="sum")

    def _time(self, name: str, work: Callable[[], Any]) -> None:
        work()
        started = time.perf_counter()
        work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def rates(self) -> dict[str, float]:
        """GFLOP/s of the products, GB/s of the stream and of the gathers: best of all rounds."""
        best = {name: min(values) for name, values in self.seconds.items()}
        flop = 2.0 * self.batch * self.d_in * self.d_sae
        rates = {f"{name}_gflops": flop / best[name] / 1e9 for name in ("mm", "onednn", "bf16") if name in best}
        rates["stream_gbs"] = 2 * 4 * self.source.numel() / best["stream"] / 1e9
        for name in ("gather", "near"):
            rates[f"{name}_gbs"] = 4.0 * self.d_in * self.far.numel() / best[name] / 1e9
        return rates


def row_reader() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any] | None:
    """A compiled loop that reads rows as fast as this machine can: dot products with a vector held in the cache. None
    without numba."""
    try:
        import numba
    except ImportError:
        return None
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))

    @numba.njit(parallel=True, fastmath=True)
    def dots(x: Any, W: Any, picked: Any, out: Any) -> None:
        for row in numba.prange(picked.shape[0]):
            vector = x[row]
            for place in range(picked.shape[1]):
                line = W[picked[row, place]]
                total = numba.float32(0.0)
                for i in range(line.shape[0]):
                    total += line[i] * vector[i]
                out[row, place] = total

    sums: dict[Any, Any] = {}

    def read(x: torch.Tensor, W: torch.Tensor, picked: torch.Tensor) -> None:
        out = sums.setdefault(picked.shape, torch.empty(picked.shape).numpy())
        dots(x.numpy(), W.numpy(), picked.numpy(), out)

    return read


def limit_ms(
    rates: dict[str, float], batch: int, d_in: int, d_sae: int, l0: float, n_prefixes: int = 1
) -> dict[str, float]:
    """The parts of the lower sum, in milliseconds, and `limit`; `float32` and `bfloat16` are the two sums."""
    flop, rows = 2.0 * batch * d_in * d_sae, 4.0 * batch * l0 * d_in
    adam = 28.0 * (2 * d_in * d_sae + d_in + d_sae) / rates["stream_gbs"]
    prefixes = 8.0 * batch * d_in * (n_prefixes - 1) / rates["stream_gbs"]
    rest = prefixes + rows / max(rates["near_gbs"], rates["gather_gbs"])
    rates32 = [rates[name] for name in ("mm_gflops", "onednn_gflops") if name in rates]
    parts = {
        "float32": {"product": flop / max(rates32), "adam": adam, "gathers": 3 * rows / rates["gather_gbs"] + rest},
        "bfloat16": {
            "product": flop / rates["bf16_gflops"],
            "adam": adam,
            "gathers": 4 * rows / rates["gather_gbs"] + rest,
        },
    }
    sums = {name: sum(values.values()) for name, values in parts.items()}
    best = min(sums, key=lambda name: sums[name])
    return {name: value / 1e6 for name, value in (parts[best] | sums | {"limit": sums[best]}).items()}
