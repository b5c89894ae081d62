"""BatchTopK: the k * batch largest activations of a whole batch stay, so that k is a mean over vectors.

    f     = ReLU(pre) at the k * batch largest entries of the batch, 0 elsewhere
    loss  = mean((x_hat - x)^2) + aux_coefficient * auxk

Applied one vector at a time there is no batch: the running mean of the cut (the smallest activation that stayed) is
then the threshold, and the SAE is saved as the JumpReLU SAE that it is with it. Bussmann et al. 2024, "BatchTopK Sparse
Autoencoders", section 3.
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.base import ARCHITECTURES, SAE
from mechint.sae.losses import add_auxk, mean_squared_error, weighted_acts
from mechint.sae.objective import Loss, Objective

# Weight of the newest batch in the running mean of the cut: a window of about 100 steps.
CUT_RATE = 0.01


class BatchSelecting(SAE):
    """What BatchTopK SAEs share: the choice over a batch, the running mean of its cut, and their saved form."""

    aux_relu = True
    has_penalty = False
    shardable = True
    latent_counts = ("k",)
    cut_mean: Tensor
    cut_weight: Tensor
    k: int | float

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        # cut_mean / cut_weight is the mean; the weight starts at 0 so that the first batches count in full
        for name in ("cut_mean", "cut_weight"):
            self.register_buffer(name, torch.zeros((), dtype=self.W_enc.dtype, device=self.W_enc.device))
        self.last_cut: Tensor | None = None  # of the batch that the next `constrain` belongs to

    def check_options(self) -> None:
        if not 0 < self.k <= self.d_sae:
            raise MechintError(
                f"--k must be above 0 and at most d_sae = {self.d_sae} for {self.architecture}, got {self.k:g}"
            )

    @property
    def looks_across_rows(self) -> bool:
        return True

    def select(self, pre: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
        """ReLU of the entries that stay; remembers their cut in `last_cut`."""
        acts = pre.relu()
        with torch.no_grad():
            scores = weighted_acts(self, acts).flatten()
            top = self.peers.top_of_batch(scores, self.n_kept(self.peers.n_rows(len(pre))))
            positive = top.values[top.values > 0]
            self.last_cut = positive[-1] if len(positive) else None
        return top.place(acts.flatten()).view_as(pre)

    def n_kept(self, batch: int) -> int:
        """Entries that stay of a batch: k * batch, rounded to the nearest (halves up)."""
        return min(int(self.k * batch + 0.5), batch * self.d_sae)

    @torch.no_grad()
    def constrain(self) -> None:
        """Take the last batch's cut into the running mean too; a batch without a positive entry has none."""
        super().constrain()
        if self.last_cut is not None:
            self.cut_mean.mul_(1 - CUT_RATE).add_(CUT_RATE * self.last_cut)
            self.cut_weight.mul_(1 - CUT_RATE).add_(CUT_RATE)
            self.last_cut = None

    @property
    def threshold(self) -> Float[Tensor, ""]:
        """Mean cut so far, in float32; 0 before the first step."""
        return (self.cut_mean / self.cut_weight.clamp_min(1e-30)).float()

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.where(weighted_acts(self, pre.relu()) > self.threshold, pre, torch.zeros_like(pre)).relu()

    def _inference_copy(self) -> SAE:
        """A JumpReLU SAE with the learned cut as the threshold of every latent."""
        norms = self.penalty_scale()
        threshold = self.threshold.detach().expand(self.d_sae) / (1 if norms is None else norms.detach())
        metadata = {
            **self.metadata,
            "training_architecture": self.architecture,
            "training_options": {name: getattr(self, name) for name in self.options},
        }
        with torch.device("meta"):  # shapes only: the values follow
            saved = ARCHITECTURES["jumprelu"](self.d_in, self.d_sae)
        if not self.W_enc.is_meta:
            weights = {name: value.detach().clone() for name, value in self.named_parameters()}
            saved.load_state_dict({**weights, "threshold": threshold.clone()}, assign=True)
            saved.to(self.W_enc.device)
        saved.unit_decoder, saved.metadata = self.unit_decoder, metadata
        return saved


@final
class BatchTopKSAE(BatchSelecting):
    """`k` latents active a vector on average over a training batch."""

    architecture = "batchtopk"
    options = {"k": 32}

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        feature_acts = self.select(self.pre_activations(x))
        x_hat = self.decode(feature_acts)
        loss = Loss({"mse": mean_squared_error(x, x_hat)}, {"mse": 1.0}, feature_acts)
        return add_auxk(loss, self, x, x_hat, objective)
