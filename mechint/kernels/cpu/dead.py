"""The sparse kernel's terms over dead latents: AuxK, and the penalty that lifts JumpReLU's dead pre-activations.

As `mechint.sae.base.auxk` and `JumpReLUSAE.loss` have them, with the gradients written out: a chunk of rows stays in
the cache from its pre-activations to their gradients, products use oneDNN where torch has it, and the gradient of the
input, which autograd would form, is left out.
"""

from typing import no_type_check

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechint.kernels.cpu.choice import kth_largest
from mechint.kernels.cpu.dense_route import product_error
from mechint.kernels.cpu.loops import compiled
from mechint.kernels.cpu.space import product
from mechint.kernels.threads import Pool
from mechint.sae import SAE, Objective

VALUES = 2**18  # pre-activations of a chunk
_NO_LEVELS = np.zeros(0, np.float32)


class DeadRoom:
    """Buffers that grow with the number of dead latents and are used again from step to step."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        n = int(np.prod(shape))
        if name not in self._held or len(self._held[name]) < n:
            self._held[name] = torch.empty(n + n // 8, dtype=dtype)
        return self._held[name][:n].view(shape)


def add_dead(
    sae: SAE,
    x: Float[Tensor, "batch d_in"],
    objective: Objective,
    residual: Float[Tensor, "batch d_in"] | None,
    grads: dict[str, Tensor],
    room: DeadRoom,
    threads: Pool,
) -> dict[str, tuple[float, float]]:
    """The terms with their weights; adds to `grads`. `residual` is x - x_hat, None where there is no AuxK term."""
    assert objective.dead is not None
    dead = objective.dead.nonzero().squeeze(1)
    batch, d_in, n = len(x), sae.d_in, len(dead)
    lift = getattr(sae, "pre_act_coefficient", 0.0)
    if not n:
        return {"pre_act": (0.0, lift)} if lift else {}
    bias_name = sae.latent_offsets()[0]
    W_enc, bias, b_dec = sae.W_enc.detach().t()[dead], sae.get_parameter(bias_name).detach()[dead], sae.b_dec.detach()
    k = min(objective.k_aux, n) if residual is not None else 0
    levels = sae.get_parameter("threshold").detach()[dead].numpy() if lift else _NO_LEVELS
    centred, pre = room.take("centred", batch, d_in), room.take("pre", batch, n)
    acts, g = room.take("acts", batch, n if k else 0), room.take("g", batch, d_in if k else 0)
    W_dec = sae.W_dec.detach()[dead] if k else None
    W_dec_columns = W_dec.t().contiguous() if W_dec is not None else None
    kept = room.take("kept", batch, n, dtype=torch.uint8)
    size = max(256, VALUES // n)
    n_chunks = -(-batch // size)
    errors, belows = np.zeros(n_chunks), np.zeros(n_chunks)
    sums, counts = np.zeros((n_chunks, n), np.float32), np.zeros((n_chunks, len(levels)), np.int64)
    factor = 2.0 * objective.aux_coefficient / (batch * d_in)
    push = np.float32(lift / (batch * d_in))

    def chunk(c: int, thread: int) -> None:
        rows = slice(size * c, min(size * (c + 1), batch))
        torch.sub(x[rows], b_dec, out=centred[rows])
        product(centred[rows], W_enc, pre[rows])
        arrays = (pre[rows].numpy(), kept[rows].numpy(), acts[rows].numpy())
        belows[c] = choose(*arrays, bias.numpy(), k, sae.aux_relu, levels, counts[c])
        if residual is not None and W_dec is not None and W_dec_columns is not None:
            errors[c] = product_error(acts[rows], W_dec_columns, residual[rows], factor, g[rows])
            product(g[rows], W_dec, pre[rows])
        back(arrays[0], arrays[1], k > 0, push, sums[c])

    threads.run(chunk, n_chunks)
    d_pre = pre
    db = torch.from_numpy(sums.sum(axis=0, dtype=np.float64))
    # in this order neither factor has to be transposed first, only the small result
    step = torch.empty(d_in, n)
    product(centred.t().contiguous(), d_pre.t(), step)
    grads["W_enc"].index_add_(1, dead, step)
    grads[bias_name].index_add_(0, dead, db.float())
    grads["b_dec"].sub_((db @ W_enc.double()).float())
    if k:
        product(g.t().contiguous(), acts.t(), step)
        grads["W_dec"].index_add_(0, dead, step.t())
    terms: dict[str, tuple[float, float]] = {}
    if lift:
        below = torch.from_numpy(counts.sum(axis=0)).float() * float(push)
        grads["threshold"].index_add_(0, dead, below)
        terms["pre_act"] = (belows.sum() / (batch * d_in), lift)
    if k:
        terms["auxk"] = (errors.sum() / (batch * d_in), objective.aux_coefficient)
    return terms


KEPT, BELOW = 1, 2  # bits: among the k largest (and above 0 where that counts); below its threshold


@compiled
@no_type_check
def choose(pre, kept, acts, bias, k, relu, levels, counts):
    """Adds the bias to `pre`; the k largest of each row into `acts`, where `relu` only those above 0. Of equal ones
    the first win. Where there are `levels`, counts what lies below them and returns the sum of the distances."""
    n = pre.shape[1]
    total = 0.0
    for r in range(pre.shape[0]):
        for j in range(n):
            pre[r, j] += bias[j]
            kept[r, j] = 0
        if levels.shape[0] > 0:
            for j in range(n):
                below = levels[j] - pre[r, j]
                if below > 0:
                    total += below
                    counts[j] += 1
                    kept[r, j] = BELOW
        if k > 0:
            least, equal = np.float32(-np.inf), k
            if k < n:
                least = kth_largest(pre[r], n, k)
                for j in range(n):
                    equal -= pre[r, j] > least
            for j in range(n):
                value = pre[r, j]
                stays = value > least
                if value == least and equal > 0:
                    stays = True
                    equal -= 1
                stays = stays and (value > 0 or not relu)
                acts[r, j] = value if stays else np.float32(0.0)
                kept[r, j] |= KEPT * stays
    return total


@compiled
@no_type_check
def back(grad, kept, with_acts, push, sums):
    """d loss / d acts into d loss / d pre, in place, and its sums by latent; without `with_acts` there is none."""
    sums[:] = 0
    for r in range(grad.shape[0]):
        for j in range(grad.shape[1]):
            value = grad[r, j] if with_acts and kept[r, j] & KEPT else np.float32(0.0)
            if kept[r, j] & BELOW:
                value -= push
            grad[r, j] = value
            sums[j] += value
