"""Which latents are dead, and setting them anew."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.sae import SAE
from mechint.sae.base import MIN_DECODER_NORM
from mechint.streams import RESAMPLING, philox

# Norm of a new encoder column, as a share of the live ones' mean (Bricken et al. 2023).
ENCODER_SHARE = 0.2


def dead_latents(
    last_fired: Int[Tensor, " d_sae"], step: int, *, batch_size: int, dead_after: int
) -> Bool[Tensor, " d_sae"]:
    """Latents that were silent in the `dead_after` vectors before `step`; `last_fired` is -1 for those that never
    were active."""
    return (step - 1 - last_fired) * batch_size >= dead_after


@torch.no_grad()
def resample(
    sae: SAE,
    optimizer: torch.optim.Optimizer,
    dead: Bool[Tensor, " d_sae"],
    x: Float[Tensor, "batch d_in"],
    *,
    seed: int,
    step: int,
) -> int:
    """Set dead latents anew at vectors that are reconstructed badly; returns how many.

    Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron resampling": a vector is drawn with probability
    proportional to its squared loss; the decoder row becomes its direction from b_dec, the encoder column the same with
    a fifth of the live columns' mean norm, the bias 0; Adam forgets the latent. Drawn from (seed, step).
    """
    n_dead, n_live = int(dead.sum()), int((~dead).sum())
    if n_dead == 0:
        return 0
    peers = sae.peers
    error = peers.gather_rows((sae.run(x)[0] - x).pow(2).sum(dim=1)).cpu().double().square().numpy()
    if not np.isfinite(error).all() or not error.sum() > 0:
        return 0
    generator = np.random.Generator(philox(seed, RESAMPLING, step))
    rows = torch.zeros_like(dead, dtype=torch.int64)
    rows[dead] = torch.from_numpy(generator.choice(len(error), size=n_dead, p=error / error.sum())).to(rows.device)
    own_dead = peers.mine(dead)
    latents = own_dead.nonzero().squeeze(1)
    directions = peers.gather_rows(x)[peers.mine(rows)[latents]] - sae.b_dec
    directions = directions / directions.norm(dim=1, keepdim=True).clamp_min(MIN_DECODER_NORM)
    one = torch.tensor(1.0, device=x.device)
    norm = peers.sum_latents(sae.W_enc[:, ~own_dead].norm(dim=0).sum()) / n_live if n_live else one
    decoder_norm = one
    if n_live and not sae.unit_decoder:
        decoder_norm = peers.sum_latents(sae.W_dec[~own_dead].norm(dim=1).sum()) / n_live
    sae.W_dec[latents] = directions * decoder_norm
    sae.W_enc[:, latents] = (directions * (ENCODER_SHARE * norm)).T
    for name in sae.latent_offsets():
        if name != "threshold":
            sae.get_parameter(name)[latents] = 0.0
    for name, parameter in sae.named_parameters():
        for moment in ("exp_avg", "exp_avg_sq"):
            values = optimizer.state.get(parameter, {}).get(moment)
            if values is None or name == "b_dec":
                continue
            if name == "W_enc":
                values[:, latents] = 0.0
            else:
                values[latents] = 0.0
    return n_dead
