"""`x @ weight.T + bias` in float32, through oneDNN where torch's default library is slow.

On AMD processors torch's float32 product goes through MKL, which takes its AVX2 path there; oneDNN, which torch brings
along, uses AVX512 where there is any and reaches about twice the speed (docs/performance.md). Both are plain float32:
the order of summation differs, so results differ in the last digits, and the choice depends on the machine alone, never
on a measurement, so that a rerun gives the same bits.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Below this many rows the product is limited by reading the weight, and the call costs more than it gains.
MIN_ROWS = 16


def linear(
    x: Float[Tensor, "rows d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "rows d_out"]:
    """As `torch.nn.functional.linear`, without gradients."""
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if fits and x.shape[0] >= MIN_ROWS and not torch.is_grad_enabled() and onednn_pays():
        return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


@functools.cache
def onednn_pays() -> bool:
    """Whether oneDNN's float32 product is there, exact, and expected to be the faster one on this machine.

    The operator is private to torch, so it is tried once against float64 before it is trusted: a version without it, or
    one that rounds its inputs to bfloat16 (ONEDNN_DEFAULT_FPMATH_MODE), is left alone.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()) or not is_amd():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 256, generator=generator) for _ in range(2))
    try:
        with torch.inference_mode():
            got = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return False
    # 256 products of unit normals: float32 keeps the error near 1e-5, bfloat16 inputs give about 1e-1.
    return bool((got.double() - x.double() @ weight.double().T).abs().max() < 1e-4)


def is_amd() -> bool:
    """Whether the processor is AMD's, whom MKL gives its slower path. Known from Linux only; elsewhere False."""
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")[:2000]
    except OSError:
        return False


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Products of float32 matrices without TF32 or bfloat16 inside, whatever the caller has set; put back after."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class FastLinear(TorchFunctionMode):
    """Within the block, every `torch.nn.functional.linear` is this module's: models of any library gain from it.

    with FastLinear(), torch.inference_mode():
        model(tokens)
    """

    def __torch_function__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and not kwargs and args[0].ndim >= 2:
            x, weight, *bias = args
            rows = x.reshape(-1, x.shape[-1])
            product = _linear_bfloat16 if x.dtype == torch.bfloat16 else linear
            return product(rows, weight, *bias).view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def _linear_bfloat16(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same bits as `torch.nn.functional.linear`, which takes oneDNN's product too but adds the bias separately."""
    fits = weight.dtype == torch.bfloat16 and x.device.type == weight.device.type == "cpu"
    if fits and x.shape[0] >= MIN_ROWS and not torch.is_grad_enabled() and onednn_pays():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
