"""What the loss of an SAE asks of the processes that share its training step.

Alone, which is the default, every question answers itself. `mechint.train.parallel` splits the rows of a batch
(each process then sees other rows) or the latents (each sees the same rows, and other latents). An architecture that
asks here whenever it looks beyond one row or sums over latents trains the same way in all three cases:

    a sum over latents            sum_latents, mean_latents; the bias that all latents read: `shared`
    a choice between latents      top (of a row), top_of_batch
    a mean that is then bent      mean_rows (a plain mean over rows needs nothing: terms and gradients are averaged)
    a range or mask of latents    here, mine
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn


class Top(NamedTuple):
    """The largest of some scores."""

    values: Float[Tensor, "*rows k"]  # of all processes, descending
    indices: Shaped[Tensor, "*rows kept"]  # where those lie that this process has; maybe more, see `kept`
    kept: Bool[Tensor, "*rows kept"] | None  # which of `indices` are among the largest; None for all

    def place(self, acts: Float[Tensor, "*rows n"], *, relu: bool = False) -> Float[Tensor, "*rows n"]:
        """`acts` (or their ReLU) where the scores were among the largest, 0 elsewhere."""
        chosen = acts.gather(-1, self.indices)
        if relu:
            chosen = chosen.relu()
        if self.kept is not None:
            chosen = chosen * self.kept
        return torch.zeros_like(acts).scatter(-1, self.indices, chosen)


class Peers:
    """One process alone; subclasses for several override what differs."""

    several_shares = False  # whether each process has a share of the latents

    def shared(self, bias: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """A parameter that all processes have, on its way into what each computes of its own latents."""
        return bias

    def sum_latents(self, part: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum over all latents from the sum over this process's."""
        return part

    def mean_latents(self, values: Float[Tensor, "batch d_sae"]) -> Float[Tensor, ""]:
        """Mean over rows and all latents."""
        return values.mean()

    def mean_rows(self, mean: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The mean over the whole batch from the mean over this process's rows."""
        return mean

    def n_rows(self, own: int) -> int:
        """Rows of the whole batch, where this process has `own` of them."""
        return own

    def top(self, scores: Float[Tensor, "*batch d_sae"], k: int) -> Top:
        """The `k` largest of each row. Between equal scores torch.topk decides."""
        return Top(*scores.topk(k, dim=-1), None)

    def top_of_batch(self, scores: Float[Tensor, " n"], k: int) -> Top:
        """The `k` largest of the whole batch, whose scores come flattened."""
        return self.top(scores, k)

    def here(self, start: int, stop: int) -> slice:
        """Which of this process's latents lie in the range `start` to `stop` of the whole dictionary."""
        return slice(start, stop)

    def mine(self, values: Shaped[Tensor, " d_sae"]) -> Shaped[Tensor, " own"]:
        """Of one value for each latent of the dictionary, those of this process's latents."""
        return values

    def max_latents(self, value: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """The maximum over all latents from that over this process's."""
        return value

    def gather_rows(self, rows: Shaped[Tensor, "own ..."]) -> Shaped[Tensor, "batch ..."]:
        """The rows of all processes in the order of the batch."""
        return rows

    def grad_norm(self, module: nn.Module) -> Float[Tensor, ""]:
        """Norm of the gradients of all parameters of the whole SAE."""
        return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])

    def __deepcopy__(self, memo: dict[int, Any]) -> "Peers":
        return self  # copies of an SAE belong to the same processes


ALONE = Peers()
