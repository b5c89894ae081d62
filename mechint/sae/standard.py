"""The canonical SAE: separate encoder and decoder, ReLU, decoder rows of unit norm.

    f     = ReLU((x - b_dec) @ W_enc + b_enc)
    x_hat = f @ W_dec + b_dec

Source of form and initialisation: reference pipeline "mech-int" (Pythia-70M, layer 3); the same architecture is
"standard" in SAELens and follows Bricken et al. 2023, "Towards Monosemanticity", section "Sparse Autoencoders".
"""

from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechint.errors import MechintError

# A row shorter than this is divided by this instead, so that an all-zero row stays finite.
MIN_DECODER_NORM = 1e-12


@final
class SparseAutoEncoder(nn.Module):
    """ReLU SAE with `d_sae = expansion * activation_dim` latents (or any `d_sae` given by keyword).

    Parameters: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`. The biases start at 0,
    the weights Xavier-normal and independent of each other, then the rows of `W_dec` are divided by their norms. Drawn
    from `generator` if given, else from torch's global one.

    `metadata` says what the SAE was trained on (hook_name, model_name, processing, prepend_bos, ...); empty if unknown.
    """

    architecture = "standard"

    def __init__(
        self,
        activation_dim: int,
        expansion: int = 8,
        *,
        d_sae: int | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.d_in = activation_dim
        self.d_sae = activation_dim * expansion if d_sae is None else d_sae
        if self.d_in < 1 or self.d_sae < 1:
            raise MechintError(f"an SAE needs d_in >= 1 and d_sae >= 1, got {self.d_in} and {self.d_sae}")
        self.W_enc = nn.Parameter(torch.empty(self.d_in, self.d_sae))
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.W_dec = nn.Parameter(torch.empty(self.d_sae, self.d_in))
        self.b_dec = nn.Parameter(torch.zeros(self.d_in))
        self.metadata: dict[str, Any] = {}
        nn.init.xavier_normal_(self.W_enc, generator=generator)
        nn.init.xavier_normal_(self.W_dec, generator=generator)
        self.renormalize_decoder()

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations to `feature_acts`, all >= 0."""
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """`feature_acts` to reconstructed activations."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_sae"]]:
        """`(x_hat, feature_acts)`."""
        feature_acts = self.encode(x)
        return self.decode(feature_acts), feature_acts

    @torch.no_grad()
    def renormalize_decoder(self) -> None:
        """Divide each row of `W_dec` by its norm, in place."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(MIN_DECODER_NORM))

    @property
    def b_pre(self) -> nn.Parameter:
        """`b_dec` under its old name."""
        return self.b_dec

    @property
    def activation_dim(self) -> int:
        """`d_in` under its old name."""
        return self.d_in

    @property
    def num_features(self) -> int:
        """`d_sae` under its old name."""
        return self.d_sae

    @property
    def num_params(self) -> int:
        return self.d_in + self.d_sae + 2 * self.d_in * self.d_sae

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # checkpoint.pt files call the decoder bias b_pre.
        if prefix + "b_pre" in state_dict:
            state_dict[prefix + "b_dec"] = state_dict.pop(prefix + "b_pre")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        where = self.metadata.get("hook_name")
        return f"{self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}" + (f", hook_name={where}" if where else "")


def SAEloss(
    x: Float[Tensor, "*batch d_in"],
    x_hat: Float[Tensor, "*batch d_in"],
    feature_acts: Float[Tensor, "*batch d_sae"],
    lam: float,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """`(loss, mse, l1)` with `loss = mse + lam * l1`; both terms are means over all their elements.

    So `lam` equals a per-token-sum coefficient times `d_sae / d_in`: it is not comparable with that of tools which sum.
    """
    mse = (x_hat - x).pow(2).mean()
    l1 = feature_acts.abs().mean()
    return mse + lam * l1, mse, l1
