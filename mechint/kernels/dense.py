"""The reference training step: dense, float32, gradients by autograd."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechint.sae import SAEloss, SparseAutoEncoder


class StepResult(NamedTuple):
    """What a step saw, before its update."""

    loss: Float[Tensor, ""]
    mse: Float[Tensor, ""]
    l1: Float[Tensor, ""]
    feature_acts: Float[Tensor, "batch d_sae"]
    active: Bool[Tensor, " d_sae"]  # latents above 0 anywhere in the batch


def dense_step(
    sae: SparseAutoEncoder,
    optimizer: torch.optim.Optimizer,
    x: Float[Tensor, "batch d_in"],
    *,
    lam: float,
    max_grad_norm: float,
) -> StepResult:
    """One update: loss, gradients, clipping by total norm, Adam, decoder rows back to unit norm.

    A loss that is not finite makes no update: the caller sees it in the result, with the weights as they were.
    """
    x_hat, feature_acts = sae(x)
    loss, mse, l1 = SAEloss(x, x_hat, feature_acts, lam)
    if torch.isfinite(loss):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), max_grad_norm)
        optimizer.step()
        sae.renormalize_decoder()
    feature_acts = feature_acts.detach()
    return StepResult(loss.detach(), mse.detach(), l1.detach(), feature_acts, feature_acts.amax(dim=0) > 0)
