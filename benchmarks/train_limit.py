"""What this machine can do, and what a training step that skips the zeros costs at the least on it.

    limit = 2 B d m / G  +  28 bytes * parameters / S  +  4 * B * L0 * 4 d bytes / R

B batch, d width, m latents. G: the best float32 product rate measured (oneDNN or torch.mm, at the encoder's shape). S:
the stream rate of Adam (reads p, g, m, v and writes p, m, v: 28 bytes a parameter). R: the rate at which decoder and
encoder rows are gathered and summed from the cache: x_hat and the gradient of f read W_dec, the two weight gradients
read x and the residual; the better of torch's embedding_bag and of reading W_dec row after row (mv). All three are the
best of all rounds: a limit of this machine at a quiet moment, in float32.
"""

import time
from collections.abc import Callable
from typing import Any

import torch


class Probe:
    """Measures the machine between the contenders' turns, so that a burst of other work shows."""

    def __init__(self, batch: int, d_in: int, d_sae: int, per_row: int = 64):
        generator = torch.Generator().manual_seed(0)
        self.batch, self.d_in, self.d_sae = batch, d_in, d_sae
        self.x = torch.randn(batch, d_in, generator=generator)
        self.W = torch.randn(d_sae, d_in, generator=generator)
        self.out = torch.empty(batch, d_sae)
        self.source = torch.randn(2**24, generator=generator)  # 64 MB: beyond the cache
        self.target = torch.empty_like(self.source)
        self.picked = torch.randint(0, d_sae, (batch, per_row), generator=generator)
        self.weights = torch.rand(batch, per_row, generator=generator)
        self.seconds: dict[str, list[float]] = {}

    def run(self) -> None:
        with torch.no_grad():
            self._time("mm", lambda: torch.mm(self.x, self.W.t(), out=self.out))
            self._time("onednn", self._onednn)
            self._time("stream", lambda: self.target.copy_(self.source))
            self._time("gather", self._gather)
            self._time("cache", self._read)

    def _onednn(self) -> None:
        # In chunks of rows, so that what the operator allocates stays in the cache instead of faulting in new pages.
        for part in self.x.split(256):
            torch.ops.mkldnn._linear_pointwise(part, self.W, None, "none", [], "")

    def _gather(self) -> None:
        for picked, weights in zip(self.picked.split(256), self.weights.split(256), strict=True):
            torch.nn.functional.embedding_bag(picked, self.W, per_sample_weights=weights, mode="sum")

    def _read(self) -> None:
        for _ in range(8):
            torch.mv(self.W, self.x[0])

    def _time(self, name: str, work: Callable[[], Any]) -> None:
        if name == "onednn" and not torch.backends.mkldnn.is_available():
            return
        work()
        started = time.perf_counter()
        work()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)

    def rates(self) -> dict[str, float]:
        """GFLOP/s of the products, GB/s of the stream and of the gathers: best of all rounds."""
        best = {name: min(values) for name, values in self.seconds.items()}
        flop = 2.0 * self.batch * self.d_in * self.d_sae
        rates = {f"{name}_gflops": flop / best[name] / 1e9 for name in ("mm", "onednn") if name in best}
        rates["stream_gbs"] = 2 * 4 * self.source.numel() / best["stream"] / 1e9
        rates["gather_gbs"] = 4.0 * self.d_in * self.picked.numel() / best["gather"] / 1e9
        rates["cache_gbs"] = 8 * 4.0 * self.W.numel() / best["cache"] / 1e9
        return rates


def limit_ms(rates: dict[str, float], batch: int, d_in: int, d_sae: int, l0: float) -> dict[str, float]:
    """The three parts and their sum, in milliseconds."""
    gflops = max(value for name, value in rates.items() if name.endswith("_gflops"))
    parts = {
        "product": 2.0 * batch * d_in * d_sae / (gflops * 1e9),
        "adam": 28.0 * (2 * d_in * d_sae + d_in + d_sae) / (rates["stream_gbs"] * 1e9),
        "gathers": 4.0 * batch * l0 * 4 * d_in / (max(rates["gather_gbs"], rates["cache_gbs"]) * 1e9),
    }
    return {name: 1e3 * seconds for name, seconds in parts.items()} | {"limit": 1e3 * sum(parts.values())}
