"""TopK: of each vector's pre-activations the k largest stay, and of those the positive ones.

    f     = ReLU(pre) at the k largest entries of pre = (x - b_dec) @ W_enc + b_enc, 0 elsewhere
    loss  = mean((x_hat - x)^2) + aux_coefficient * auxk

Some tools leave the ReLU out, so that negative entries stay where fewer than k are positive. Such an SAE can be applied
here (`relu=False`), not trained.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3 and appendix A.2 (AuxK).
"""

from typing import final

from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae.base import SAE
from mechint.sae.losses import add_auxk, mean_squared_error
from mechint.sae.objective import Loss, Objective


@final
class TopKSAE(SAE):
    """At most `k` latents active a vector. Needs no penalty: `Objective.sparsity` is not used.

    `relu`: whether negative entries among the `k` largest are dropped. Where they are not, `feature_acts` may be
    negative, and files say so with a tensor of this name.
    """

    architecture = "topk"
    options = {"k": 32}
    latent_counts = ("k",)
    saved_tensors = ("W_enc", "b_enc", "W_dec", "b_dec", "k")
    departures = {"relu": True}
    aux_relu = True
    has_penalty = False
    shardable = True
    k: int
    relu: bool

    def check_options(self) -> None:
        usable = isinstance(self.k, (int, float)) and not isinstance(self.k, bool) and float(self.k).is_integer()
        if not usable or not 1 <= self.k <= self.d_sae:
            raise MechintError(f"--k must be a whole number from 1 to d_sae = {self.d_sae} for topk, got {self.k!r}")
        self.k, self.relu = int(self.k), bool(self.relu)

    def activate(self, pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        """ReLU (if it has one) of the `k` largest entries of each row; with free decoder rows, largest times the row's
        norm. Between equal entries torch.topk decides."""
        if self.cfg.rescale_acts_by_decoder_norm:
            pre = pre * self.decoder_norms()
        scale = self.penalty_scale()
        scores = (pre if scale is None else pre * scale).detach()
        return self.peers.top(scores, self.k).place(pre, relu=self.relu)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_out"]:
        if self.cfg.rescale_acts_by_decoder_norm:
            feature_acts = feature_acts / self.decoder_norms()
        return super().decode(feature_acts)

    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        if not self.relu:
            raise MechintError("a topk SAE without ReLU can be applied here, not trained: train one with ReLU instead")
        x_hat, feature_acts = self.run(x)
        loss = Loss({"mse": mean_squared_error(x, x_hat)}, {"mse": 1.0}, feature_acts)
        return add_auxk(loss, self, x, x_hat, objective)
