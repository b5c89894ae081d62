"""Tensors of a file as the parameters of an SAE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mechint.errors import MechintError


def in_float64(x: Tensor) -> Tensor:
    """`x` in float64, on the CPU where its device has none (Apple's GPUs)."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def widths_of(tensors: Mapping[str, Any], source: str | Path) -> tuple[int, int, int]:
    """`(d_in, d_sae, d_out)` of the weights."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise MechintError(f"{source}: {name} is no tensor")
    for name in ("W_enc", "W_dec"):
        if name not in tensors or tensors[name].ndim != 2:
            found = ", ".join(f"{key} {list(value.shape)}" for key, value in list(tensors.items())[:8])
            raise MechintError(f"{source} is not an SAE: {name} should be a matrix; found {found or 'nothing'}")
    (d_in, d_sae), d_out = tensors["W_enc"].shape, tensors["W_dec"].shape[1]
    if min(d_in, d_sae, d_out) < 1:
        raise MechintError(f"{source}: an SAE needs d_in and d_sae of at least 1, found {d_in} and {d_sae}")
    return d_in, d_sae, d_out


def fitting(sae: nn.Module, architecture: str, tensors: Mapping[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """The tensors as the parameters of `sae`: contiguous float32, `W_enc` column by column."""
    expected = {name: tuple(parameter.shape) for name, parameter in sae.named_parameters()}
    missing, extra = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    if missing or extra:
        parts = [f"lacks {', '.join(sorted(missing))}"] if missing else []
        parts += [f"has {', '.join(sorted(extra)[:8])} too"] if extra else []
        raise MechintError(f"{source}: {architecture} holds {', '.join(expected)}; this one {' and '.join(parts)}")
    fitting = {}
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise MechintError(f"{source}: {name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise MechintError(f"{source}: {name} holds values that are not finite floating-point numbers")
        tensor = tensor.detach().to("cpu", torch.float32)
        # laid out as a new SAE's: products round by layout, and it should compute the same bits before and after saving
        fitting[name] = tensor.t().contiguous().t() if name == "W_enc" else tensor.contiguous()
    return fitting
