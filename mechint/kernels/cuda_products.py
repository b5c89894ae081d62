"""Matrix products at a named precision.

    float32   exact: plain float32 (default)
    tf32      lossy: a GPU's tensor cores round the factors to 10 bits of mantissa
    bf16      lossy: factors are rounded to bfloat16, 7 bits of mantissa; sums and results stay float32 on a GPU

Weights, their gradients, Adam's moments and everything that is not a product are float32 in all of them.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from mechint.errors import MechintError, nearest

PRECISIONS = ("float32", "tf32", "bf16")


class Products:
    """`mm(a, b)` with factors that went through `mm.cast` once each; the result is float32."""

    def __init__(self, precision: str, device: torch.device):
        if precision not in PRECISIONS:
            raise MechintError(f"unknown --precision {precision!r}; {nearest(precision, PRECISIONS)}")
        if precision == "tf32" and device.type != "cuda":
            raise MechintError(f"--precision tf32 needs a CUDA device, this is {device.type}: use float32 or bf16")
        self.precision, self.on_cuda = precision, device.type == "cuda"

    def cast(self, factor: Tensor) -> Tensor:
        return factor.bfloat16() if self.precision == "bf16" else factor

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if self.precision != "bf16":
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        # a GPU's product leaves its float32 sums as they are; a CPU's rounds them to bfloat16
        product = torch.mm(a, b, out_dtype=torch.float32) if self.on_cuda else torch.mm(a, b).float()
        return product if out is None else out.copy_(product)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Whether float32 products may be rounded to TF32 is a switch of the process: set it, and set it back."""
        if not self.on_cuda:
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
