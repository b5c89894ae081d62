"""Which kernel trains an SAE on this machine."""

import logging
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from mechint.errors import MechintError, nearest
from mechint.kernels.contract import Kernel
from mechint.kernels.dense import DenseKernel
from mechint.sae import SAE

if TYPE_CHECKING:
    from mechint.kernels.cpu import EntryFinder

KERNELS = ("auto", "dense", "sparse", "manual")

log = logging.getLogger(__name__)


def make_kernel(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    *,
    kernel: str = "auto",
    project_gradient: bool = False,
    precision: str = "float32",
) -> Kernel:
    """The kernel of that name; `auto` takes the fastest that fits the SAE and its device.

    Only `manual` knows a `precision` other than float32 (mechint/kernels/gpu/products.py).

    Raises:
        MechintError: an unknown name, or a kernel that cannot train this SAE here.
    """
    if kernel not in KERNELS:
        raise MechintError(f"unknown --kernel {kernel!r}; {nearest(kernel, KERNELS)}")
    lossy, on_cuda = precision != "float32", sae.W_enc.device.type == "cuda"
    if lossy and kernel not in ("auto", "manual"):
        raise MechintError(f"--precision {precision} needs --kernel manual, not {kernel}, which is exact")
    if lossy or kernel == "manual" or (kernel == "auto" and on_cuda):
        from mechint.kernels import gpu

        reason = gpu.misfit(sae, optimizer)
        if reason is None:
            return gpu.ManualKernel(sae, optimizer, project_gradient=project_gradient, precision=precision)
        if lossy or kernel == "manual":
            raise MechintError(
                f"--kernel manual cannot train this SAE, {reason}: use --kernel dense and --precision float32"
            )
    if kernel == "sparse" or (kernel == "auto" and sae.W_enc.device.type == "cpu"):
        module, reason = _cpu()
        if module is not None:
            reason = module.misfit(sae, optimizer) or module.broken(sae.architecture)
            if reason is None:
                return module.SparseKernel(sae, optimizer, project_gradient=project_gradient)
        if kernel == "sparse":
            raise MechintError(f"--kernel sparse cannot train this SAE: {reason}; use --kernel auto or dense")
        # said once a run, and only where a user could expect otherwise
        log.warning("training densely, several times slower than with the sparse kernel: %s", reason)
    return DenseKernel(sae, optimizer, project_gradient=project_gradient)


def entry_finder(sae: SAE) -> "EntryFinder | None":
    """What finds the active entries of this SAE without computing the others; None where that cannot be done here."""
    module, _ = _cpu()
    return None if module is None else module.entry_finder(sae)


def _cpu() -> tuple[ModuleType | None, str]:
    """The CPU's kernel, or why it cannot be loaded: it needs numba, which not every platform has."""
    try:
        from mechint.kernels import cpu
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: numba finds no place for its cache
        return None, f"its compiler cannot be loaded ({error})"
    return cpu, ""
