"""What steering does to the hook's value `x`: add along a direction, project it out, or clamp it; the same for a
latent's own activation. Every edit acts on each position by itself and computes in float32. Edits of a latent take
what the SAE reads as a second argument where that is another hook's value, as a transcoder's is."""

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.models import Edit
from mechint.sae import SAE
from mechint.steering.extract import check_latent


def add_direction(vector: Float[Tensor, " d_in"], amount: float) -> Edit:
    """x + amount * vector; `amount` in activation units for a unit vector."""

    def edit(x: Float[Tensor, "*batch d_in"], *read: Tensor) -> Float[Tensor, "*batch d_in"]:
        return (x.float() + amount * vector.to(x.device)).to(x)

    return edit


def clamp_direction(vector: Float[Tensor, " d_in"], value: float) -> Edit:
    """x + (value - x . vector) * vector for a unit vector: the projection becomes `value`, the rest stays."""

    def edit(x: Float[Tensor, "*batch d_in"], *read: Tensor) -> Float[Tensor, "*batch d_in"]:
        wide, along = x.float(), vector.to(x.device)
        return (wide + (value - wide @ along)[..., None] * along).to(x)

    return edit


def ablate_direction(vector: Float[Tensor, " d_in"]) -> Edit:
    """x - (x . vector) * vector for a unit vector: nothing is left along it."""
    return clamp_direction(vector, 0.0)


def clamp_latent(sae: SAE, latent: int, value: float) -> Edit:
    """x + (value - f(x)) * W_dec[latent]: what the latent contributes is that of an activation of `value`.

    The SAE's error stays as it is. `f` is the latent's activation before the edit; encoding the result again need not
    give `value`, since encoder columns are not orthogonal and a sparse architecture may choose other latents.
    """
    check_latent(sae, latent)

    def edit(
        x: Float[Tensor, "*batch d_out"], read: Float[Tensor, "*batch d_in"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        wide = (x if read is None else read).to(sae.W_enc)
        acts = sae.encode(wide.reshape(-1, wide.shape[-1]))[:, latent, None]
        with torch.no_grad():
            change = ((value - acts) * sae.output_scale()).reshape(*wide.shape[:-1], 1)
            return (x.to(sae.W_enc) + change * sae.W_dec[latent]).to(x)

    return edit


def ablate_latent(sae: SAE, latent: int) -> Edit:
    """x - f(x) * W_dec[latent]: the latent's contribution is removed where it fires."""
    return clamp_latent(sae, latent, 0.0)
