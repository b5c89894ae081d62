"""The reference: dense, float32, gradients by autograd."""

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.kernels.contract import Pass, StepResult, StepSettings
from mechint.sae import SAE, Objective


@final
class DenseKernel:
    """Training steps in plain torch, on any device.

    `project_gradient` removes from each decoder row's gradient its part along the row, which renormalising would undo
    but Adam's moments would remember (Bricken et al. 2023, "Towards Monosemanticity", appendix).
    """

    name = "dense"

    def __init__(self, sae: SAE, optimizer: torch.optim.Optimizer, *, project_gradient: bool = False):
        self.sae, self.optimizer, self.project_gradient = sae, optimizer, project_gradient

    def backward(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Pass:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.sae.loss(x, objective)
        total = loss.total
        total.backward()
        acts = loss.feature_acts.detach()
        terms = {"loss": total.detach(), **{name: term.detach() for name, term in loss.terms.items()}}
        return Pass(terms, (acts != 0).sum(), torch.count_nonzero(acts > 0, dim=0))

    def update(self, lr: float, max_grad_norm: float) -> Float[Tensor, ""]:
        W_dec = self.sae.W_dec
        if self.project_gradient and W_dec.grad is not None:
            with torch.no_grad():
                unit = torch.nn.functional.normalize(W_dec, dim=1)
                W_dec.grad.sub_((W_dec.grad * unit).sum(dim=1, keepdim=True) * unit)
        norm = self.sae.peers.grad_norm(self.sae)
        torch.nn.utils.clip_grads_with_norm_(self.sae.parameters(), max_grad_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.sae.constrain()
        return norm

    def step(self, x: Float[Tensor, "batch d_in"], settings: StepSettings) -> StepResult:
        result = self.backward(x, settings.objective)
        if not torch.isfinite(result.terms["loss"]):
            return StepResult(*result, torch.full_like(result.terms["loss"], torch.nan))
        return StepResult(*result, self.update(settings.lr, settings.max_grad_norm))
