"""Matrix products at a named precision, and what follows two of them in a step.

    float32   exact: plain float32 (default)
    tf32      lossy: a GPU's tensor cores round the factors to 10 bits of mantissa
    bf16      lossy: factors are rounded to bfloat16, 7 bits of mantissa; sums and results stay float32 on a GPU

Weights, their gradients, Adam's moments and everything that is not a product are float32 in all of them.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from types import ModuleType

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechint.errors import MechintError, nearest

# Columns and rows of a tile, and rows that one program walks down.
LATENTS, ROWS, SHARE = 128, 16, 256
PRECISIONS = ("float32", "tf32", "bf16")


class Products:
    """`mm(a, b)` with factors that went through `mm.cast` once each; the result is float32."""

    def __init__(self, precision: str, device: torch.device, *, fuse: bool | None = None):
        """`fuse`: whether Triton does `relu` and `mask` in one pass each; if not given, on CUDA where it is there."""
        if precision not in PRECISIONS:
            raise MechintError(f"unknown --precision {precision!r}; {nearest(precision, PRECISIONS)}")
        if precision == "tf32" and device.type != "cuda":
            raise MechintError(f"--precision tf32 needs a CUDA device, this is {device.type}: use float32 or bf16")
        if precision == "bf16" and device.type == "cuda" and "dtype_out" not in torch.ops.aten.mm.overloads():
            raise MechintError("--precision bf16 on CUDA needs torch 2.8 or later: use tf32, or update torch")
        self.precision, self.on_cuda = precision, device.type == "cuda"
        self.fuse = self.on_cuda and has_triton(device) if fuse is None else fuse

    def cast(self, factor: Tensor) -> Tensor:
        return factor.bfloat16() if self.precision == "bf16" else factor

    def __call__(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        if self.precision != "bf16":
            return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
        if not self.on_cuda:  # a CPU's product rounds its sums to bfloat16
            product = torch.mm(a, b).float()
            return product if out is None else out.copy_(product)
        if out is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.mm(a, b, out_dtype=torch.float32, out=out)

    def relu(
        self, pre: Float[Tensor, "batch d_sae"], bias: Float[Tensor, " d_sae"], saturation: float = 0.0
    ) -> tuple[Shaped[Tensor, "batch d_sae"], Int[Tensor, " d_sae"], Float[Tensor, ""]]:
        """`(code, fire_counts, penalty)` of f = ReLU(pre + bias): f as a factor of products, and the sum of
        f / (1 + saturation f). `pre` is used up."""
        if not self.fuse:
            acts = pre.add_(bias).relu_()
            penalty = acts / (1 + saturation * acts) if saturation else acts
            return self.cast(acts), (acts > 0).sum(dim=0), penalty.sum()
        code = torch.empty_like(pre, dtype=torch.bfloat16) if self.precision == "bf16" else pre
        grid, share, shape = _grid(pre)
        counts = torch.empty(grid[1], pre.shape[1], dtype=torch.int32, device=pre.device)
        sums = torch.empty(grid[1], pre.shape[1], device=pre.device)
        kernels().relu_columns[grid](pre, bias, code, counts, sums, saturation, *pre.shape, SHARE=share, **shape)
        return code, counts.sum(dim=0), sums.sum()

    def mask(
        self,
        d_acts: Float[Tensor, "batch d_sae"],
        code: Shaped[Tensor, "batch d_sae"],
        shift: Float[Tensor, ""],
        saturation: float = 0.0,
    ) -> tuple[Shaped[Tensor, "batch d_sae"], Float[Tensor, " d_sae"]]:
        """`(d_pre, its sum over the batch)`: d_acts + shift / (1 + saturation f)^2 where the code f is positive, 0
        elsewhere. The first is a factor of products; `d_acts` is used up."""
        if not self.fuse:
            lift = shift / (1 + saturation * code.float()).square() if saturation else shift
            d_pre = d_acts.add_(lift).mul_(code > 0)
            return self.cast(d_pre), d_pre.sum(dim=0)
        d_pre = torch.empty_like(code) if self.precision == "bf16" else d_acts
        grid, share, shape = _grid(d_acts)
        sums = torch.empty(grid[1], d_acts.shape[1], device=d_acts.device)
        kernels().mask_columns[grid](d_acts, code, shift, d_pre, sums, saturation, *d_acts.shape, SHARE=share, **shape)
        return d_pre, sums.sum(dim=0)

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


def _grid(code: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    batch, d_sae = code.shape
    return (math.ceil(d_sae / LATENTS), math.ceil(batch / SHARE)), SHARE, {"ROWS": ROWS, "LATENTS": LATENTS}


@functools.cache
def triton_kernels() -> ModuleType | None:
    """The kernels, or None where there is no Triton."""
    try:
        from mechint.kernels.gpu import triton_kernels
    except ImportError:
        return None
    return triton_kernels


def kernels() -> ModuleType:
    """The kernels, where `has_triton` was asked before."""
    found = triton_kernels()
    assert found is not None
    return found


def has_triton(device: torch.device) -> bool:
    """Whether the kernels run there: on CUDA, or anywhere by Triton's interpreter."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return triton_kernels() is not None
