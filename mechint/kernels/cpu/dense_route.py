"""The sparse kernel's route for batches whose code is still dense: all five products, without autograd's detours.

Rows go through in chunks that stay in the cache; products use oneDNN where torch has it; the gradient of the input,
which autograd forms, is left out (d loss / d b_dec comes from the sums of d pre); buffers are used again. For
architectures that start dense: standard, jumprelu and gated.
"""

from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

from mechint.kernels.cpu.loops import compiled
from mechint.kernels.cpu.space import product
from mechint.kernels.threads import Pool
from mechint.sae import SAE, Objective

ROWS = 256  # of a chunk
LATENTS = 512  # of a unit of the weight gradients
KINDS = {"standard": 0, "jumprelu": 1, "gated": 2}


class DenseRoute:
    """Buffers for batches of one size, and the pass through them. Needs 2 (gated: 3) * batch * d_sae floats."""

    def __init__(self, sae: SAE, batch: int, n_threads: int):
        self.batch, self.n_threads = batch, n_threads
        d_in, d_sae = sae.d_in, sae.d_sae
        self.acts, self.pre = torch.empty(batch, d_sae), torch.empty(batch, d_sae)
        self.gate = torch.empty(batch if sae.architecture == "gated" else 0, d_sae)
        self.x, self.g = torch.empty(batch, d_in), torch.empty(batch, d_in)
        self.gate_g = torch.empty(batch if sae.architecture == "gated" else 0, d_in)
        self.grad = [torch.empty(ROWS, d_sae) for _ in range(n_threads)]
        self.gate_grad = [torch.empty(ROWS if len(self.gate) else 0, d_sae) for _ in range(n_threads)]
        self.product = torch.empty(d_in, d_sae)
        self.n_chunks = -(-batch // ROWS)
        # per chunk and latent: times active, sum of d pre, sum of the architecture's own gradient and its product
        self.fired = np.zeros((self.n_chunks, d_sae), np.int64)
        self.sums = np.zeros((3, self.n_chunks, d_sae), np.float32)
        self.errors = np.zeros((2, self.n_chunks))
        self.totals = np.zeros(self.n_chunks)

    def backward(
        self, sae: Any, x: Tensor, objective: Objective, grads: dict[str, Tensor], threads: Pool
    ) -> tuple[dict[str, tuple[float, float]], Tensor]:
        """Terms of the loss with their weights, and how often each latent fired; gradients into `grads`.

        After it, `other_sums`, `moments` and `residual` are as those of `Space`.
        """
        kind = KINDS[sae.architecture]
        batch, d_in = self.batch, sae.d_in
        W_enc, W_dec = sae.W_enc.detach().t(), sae.W_dec.detach()
        W_dec_columns = W_dec.t().contiguous()
        b_dec, bias = sae.b_dec.detach(), sae.get_parameter(sae.latent_offsets()[0]).detach().numpy()
        level, gain, scale = _latent_constants(sae)
        factor = 2.0 / (batch * d_in)

        def forward(c: int, thread: int) -> None:
            rows = slice(ROWS * c, min(ROWS * (c + 1), batch))
            torch.sub(x[rows], b_dec, out=self.x[rows])
            product(self.x[rows], W_enc, self.pre[rows])
            gate = self.gate[rows] if kind == 2 else self.acts[rows]
            arrays = (self.pre[rows].numpy(), self.acts[rows].numpy(), gate.numpy())
            self.totals[c] = activate(kind, *arrays, bias, level, gain, self.fired[c])
            self.errors[0, c] = product_error(self.acts[rows], W_dec_columns, self.x[rows], factor, self.g[rows])
            if kind == 2:
                self.errors[1, c] = product_error(gate, W_dec_columns, self.x[rows], factor, self.gate_g[rows])

        threads.run(forward, self.n_chunks)
        terms, weights = _terms(
            sae, objective, self.errors.sum(axis=1), self.totals.sum(), int(self.fired.sum()), batch
        )

        def back(c: int, thread: int) -> None:
            rows = slice(ROWS * c, min(ROWS * (c + 1), batch))
            n = rows.stop - rows.start
            grad, gate_grad = self.grad[thread][:n], self.gate_grad[thread][:n]
            product(self.g[rows], W_dec, grad)
            if kind == 2:
                product(self.gate_g[rows], W_dec, gate_grad)
            sources = (self.pre[rows].numpy(), self.acts[rows].numpy(), grad.numpy(), gate_grad.numpy())
            tanh = finish(
                kind, *sources, level, gain, scale, *weights, self.sums[0, c], self.sums[1, c], self.sums[2, c]
            )
            self.totals[c] = tanh

        threads.run(back, self.n_chunks)
        if kind == 1 and sae.penalty == "tanh":
            terms["l0_penalty"] = (self.totals.sum() / batch / d_in, objective.sparsity)

        # in this order neither factor has to be transposed first, only the small result; parallel inside
        product(self.g.t().contiguous(), self.acts.t(), self.product)
        grads["W_dec"].copy_(self.product.t())
        product(self.x.t().contiguous(), self.pre.t(), self.product)
        grads["W_enc"].copy_(self.product)
        db, self.other_sums, self.moments = (part.sum(axis=0, dtype=np.float64) for part in self.sums)
        grads[sae.latent_offsets()[0]].copy_(torch.from_numpy(db))
        db_dec = self.g.sum(dim=0, dtype=torch.float64) - W_enc.double().t() @ torch.from_numpy(db)
        grads["b_dec"].copy_(db_dec)
        return terms, torch.from_numpy(self.fired.sum(axis=0))

    def residual(self) -> Tensor:
        """x - x_hat."""
        return self.g * (-0.5 * self.g.numel())


def product_error(acts: Tensor, W_dec_columns: Tensor, target: Tensor, factor: float, out: Tensor) -> float:
    """`factor` * (acts @ W_dec - target) into `out`. Returns the sum of squared errors."""
    product(acts, W_dec_columns, out)
    out.sub_(target)
    total = torch.linalg.vector_norm(out, dtype=torch.float64).square().item()
    out.mul_(factor)
    return total


def _latent_constants(sae: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the elementwise loops need beside the bias: (threshold, unused, [bandwidth, tanh scale, to input]) of
    jumprelu; (b_mag, exp(r_mag), unused) of gated; (unused, [saturation], unused) of standard."""
    nothing = np.zeros(0, np.float32)
    if sae.architecture == "jumprelu":
        shape = (sae.bandwidth, sae.tanh_scale, float(sae.ste_to_input))
        return sae.threshold.detach().numpy(), nothing, np.array(shape, np.float32)
    if sae.architecture == "gated":
        return sae.b_mag.detach().numpy(), gain_of(sae), nothing
    return nothing, np.array([sae.saturation], np.float32), nothing


def _terms(
    sae: Any, objective: Objective, errors: np.ndarray, total: float, active: int, batch: int
) -> tuple[dict[str, tuple[float, float]], tuple[np.float32, np.float32]]:
    """Terms, and the weights of an entry in the loss: of its activation (jumprelu: of being active), of its tanh."""
    mse, n_values = errors[0] / (batch * sae.d_in), batch * sae.d_sae
    if sae.architecture != "jumprelu":
        terms = {"mse": (mse, 1.0), "l1": (total / n_values, objective.sparsity)}
        if sae.architecture == "gated":
            terms["gate_mse"] = (errors[1] / (batch * sae.d_in), 1.0)
        return terms, (np.float32(objective.sparsity / n_values), np.float32(0.0))
    penalty, step, tanh = jump_penalty(sae, objective, active, batch)
    return {"mse": (mse, 1.0), "l0_penalty": (penalty / sae.d_in, objective.sparsity)}, (step, tanh)


def jump_penalty(sae: Any, objective: Objective, active: int, batch: int) -> tuple[float, np.float32, np.float32]:
    """JumpReLU's penalty (before division by d_in; 0 for tanh, which is a sum over entries), and the weights in the
    loss of an entry's being active and of its tanh."""
    l0, weight = active / batch, objective.sparsity / (sae.d_in * batch)
    if sae.penalty == "tanh":
        return 0.0, np.float32(0.0), np.float32(weight)
    if sae.target_l0 is None:
        return l0, np.float32(weight), np.float32(0.0)
    excess = l0 / sae.target_l0 - 1
    return excess**2, np.float32(weight * 2 * excess / sae.target_l0), np.float32(0.0)


def gain_of(sae: Any) -> np.ndarray:
    """exp(r_mag). Not by torch: it starts its own threads for that, which then wait on the cores that ours work on."""
    return np.exp(sae.r_mag.detach().numpy())


@compiled
@no_type_check
def activate(kind, pre, acts, gate, bias, level, gain, fired):
    """Form feature_acts; `pre` becomes the pre-activation with its bias (gated: the open gate). Counts per latent;
    returns the sum of what the penalty weighs."""
    zero, one = np.float32(0.0), np.float32(1.0)
    fired[:] = 0
    total = 0.0
    counts = np.zeros(pre.shape[1], np.int32)
    for r in range(pre.shape[0]):
        part = zero
        if kind == 0:
            for j in range(pre.shape[1]):
                value = pre[r, j] + bias[j]
                # NaN stays NaN
                act = zero if value <= zero else value
                acts[r, j] = act
                part += act
                counts[j] += act > zero
            if gain[0] != zero:
                part = zero
                for j in range(pre.shape[1]):
                    part += acts[r, j] / (one + gain[0] * acts[r, j])
        elif kind == 1:
            for j in range(pre.shape[1]):
                value = pre[r, j] + bias[j]
                pre[r, j] = value
                act = zero if value <= level[j] else value
                acts[r, j] = act
                counts[j] += act > zero
        else:
            for j in range(pre.shape[1]):
                u = pre[r, j]
                opened = u + bias[j]
                opened = zero if opened <= zero else opened
                mag = u * gain[j] + level[j]
                act = zero if (opened == zero or mag <= zero) else mag
                gate[r, j] = opened
                acts[r, j] = act
                pre[r, j] = opened
                part += opened
                counts[j] += act > zero
        total += part
    fired[:] = counts
    return total


@compiled
@no_type_check
def finish(kind, pre, acts, grad, gate_grad, level, gain, scale, weight, tanh, db, own, moment):
    """d loss / d pre into `pre` (gated: of u), and sums over the rows per latent. Returns the sum of tanh penalties."""
    zero, one = np.float32(0.0), np.float32(1.0)
    total = 0.0
    db[:] = zero
    own[:] = zero
    moment[:] = zero
    for r in range(pre.shape[0]):
        if kind == 0 and gain[0] != zero:
            for j in range(pre.shape[1]):
                share = one / (one + gain[0] * acts[r, j])
                value = grad[r, j] + weight * share * share if acts[r, j] > zero else zero
                pre[r, j] = value
                db[j] += value
        elif kind == 0:
            for j in range(pre.shape[1]):
                value = grad[r, j] + weight if acts[r, j] > zero else zero
                pre[r, j] = value
                db[j] += value
        elif kind == 1:
            bandwidth, tanh_scale, to_input = scale[0], scale[1], scale[2]
            half, push = bandwidth / 2, weight / bandwidth
            if tanh != zero:
                for j in range(pre.shape[1]):
                    squashed = np.tanh(tanh_scale * acts[r, j])
                    total += squashed
                    grad[r, j] += tanh * tanh_scale * (one - squashed * squashed)
            for j in range(pre.shape[1]):
                inside = one if abs(pre[r, j] - level[j]) < half else zero
                value = grad[r, j] if pre[r, j] > level[j] else zero
                own[j] -= inside * (level[j] / bandwidth * grad[r, j] + push)
                value += to_input * inside * push
                pre[r, j] = value
                db[j] += value
        else:
            for j in range(pre.shape[1]):
                mag = grad[r, j] if acts[r, j] > zero else zero
                value = gate_grad[r, j] + weight if pre[r, j] > zero else zero
                value += mag * gain[j]
                own[j] += mag
                moment[j] += mag * acts[r, j]
                pre[r, j] = value
                db[j] += value
    return total
