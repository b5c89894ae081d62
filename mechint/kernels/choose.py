"""Which kernel trains an SAE on this machine."""

import torch

from mechint.errors import MechintError, nearest
from mechint.kernels.contract import Kernel
from mechint.kernels.dense import DenseKernel
from mechint.sae import SAE

KERNELS = ("auto", "dense")


def make_kernel(
    sae: SAE, optimizer: torch.optim.Optimizer, *, kernel: str = "auto", project_gradient: bool = False
) -> Kernel:
    """The kernel of that name; `auto` takes the fastest that fits the SAE and its device.

    Raises:
        MechintError: an unknown name, or a kernel that cannot train this SAE here.
    """
    if kernel not in KERNELS:
        raise MechintError(f"unknown --kernel {kernel!r}; {nearest(kernel, KERNELS)}")
    return DenseKernel(sae, optimizer, project_gradient=project_gradient)
