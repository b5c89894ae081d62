"""The sparse kernel's update: clip by total norm, Adam and constraints in one pass over the weights."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechint.kernels.cpu import loops
from mechint.kernels.threads import Pool
from mechint.sae import SAE
from mechint.sae.base import MIN_DECODER_NORM

ROWS = 256  # a unit of work
CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_


def is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `adam_update` does what that optimizer would."""
    return type(optimizer) is torch.optim.Adam and not any(
        group["weight_decay"] or group["amsgrad"] or group["maximize"] or isinstance(group["lr"], Tensor)
        for group in optimizer.param_groups
    )


@torch.no_grad()
def adam_update(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    lr: float,
    max_grad_norm: float,
    squares: float | None,
    threads: Pool,
) -> Float[Tensor, ""]:
    """As `DenseKernel.update`, with torch's own state, so that either can go on where the other stopped.

    `squares` is the sum of squares of all gradients where it is known. The gradients are left unclipped.
    """
    parameters = [p for p in sae.parameters() if p.grad is not None]
    if squares is None:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters]))
    else:
        norm = torch.tensor(squares, dtype=torch.float64).sqrt().float()
    clip = (max_grad_norm / (norm + CLIP_EPS)).clamp(max=1.0).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    # a decoder row is renormalised while it is in the cache
    jobs = [job for p in parameters for job in _jobs(p, optimizer, clip, unit=p is sae.W_dec and sae.unit_decoder)]
    threads.run(lambda item, thread: loops.adam_rows(*jobs[item]), len(jobs))
    _constrain_rest(sae)
    return norm


def _constrain_rest(sae: SAE) -> None:
    """`sae.constrain()` without the renormalisation, which is done."""
    unit_decoder, sae.unit_decoder = sae.unit_decoder, False
    try:
        sae.constrain()
    finally:
        sae.unit_decoder = unit_decoder


def _jobs(p: torch.nn.Parameter, optimizer: torch.optim.Optimizer, clip: float, *, unit: bool) -> list[tuple[Any, ...]]:
    """Arguments of `adam_rows` for a parameter, by blocks of rows."""
    group = next(group for group in optimizer.param_groups if any(p is q for q in group["params"]))
    state = optimizer.state[p]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32)
        state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p) for _ in range(2))
    state["step"] += 1
    for key in ("exp_avg", "exp_avg_sq"):
        if state[key].stride() != p.stride():  # as read back from a file
            state[key] = torch.empty_like(p).copy_(state[key])
    assert p.grad is not None
    grad = p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad)
    arrays = [_by_rows(v) for v in (p.detach(), grad, state["exp_avg"], state["exp_avg_sq"])]
    t, (beta1, beta2) = state["step"].item(), group["betas"]
    betas = tuple(map(np.float32, (beta1, 1 - beta1, beta2, 1 - beta2)))
    scalars = tuple(map(np.float32, (group["eps"], group["lr"] / (1 - beta1**t), (1 - beta2**t) ** 0.5)))
    n = len(arrays[0])
    spans = [(first, min(first + ROWS, n)) for first in range(0, n, ROWS)]
    return [(*arrays, *span, np.float32(clip), betas, *scalars, unit, np.float32(MIN_DECODER_NORM)) for span in spans]


def _by_rows(tensor: Tensor) -> np.ndarray:
    """Two dimensions, the second contiguous."""
    if tensor.ndim < 2:
        return tensor.reshape(1, -1).numpy()
    return (tensor if tensor.is_contiguous() else tensor.t()).numpy()
