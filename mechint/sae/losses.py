"""Terms of the loss that architectures share."""

from jaxtyping import Float
from torch import Tensor

from mechint.sae.base import SAE
from mechint.sae.objective import Loss, Objective
from mechint.sae.peers import ALONE, Peers


def mean_squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Mean over batch and d_in."""
    return (x_hat - x).pow(2).mean()


def weighted_acts(sae: SAE, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
    """`feature_acts` in units of what they add to the reconstruction: times the norm of their decoder row."""
    scale = sae.penalty_scale()
    return feature_acts if scale is None else feature_acts * scale


def add_auxk(
    loss: Loss, sae: SAE, x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"], objective: Objective
) -> Loss:
    """The loss with the AuxK term, where there are dead latents to revive.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", A.2: the `k_aux` largest pre-activations of dead
    latents reconstruct what the live ones left, e = x - x_hat (taken as a constant):
    auxk = mean((e - acts @ W_dec[dead])^2). Where a bias keeps latents off (ReLU, JumpReLU, gated) all pre-activations
    of a dead latent are negative, and ReLU would leave it without a gradient: there they are taken as they are.
    """
    if objective.dead is None or not objective.aux_coefficient or not objective.k_aux:
        return loss
    n_dead = int(objective.dead.sum())
    if n_dead == 0:
        return loss
    dead = sae.peers.mine(objective.dead).nonzero().squeeze(1)
    bias = sae.get_parameter(sae.latent_offsets()[0])
    term = auxk(
        x,
        x_hat.detach(),
        sae.b_dec,
        sae.W_enc[:, dead],
        bias[dead],
        sae.W_dec[dead],
        min(objective.k_aux, n_dead),
        sae.aux_relu,
        sae.peers,
    )
    terms, weights = {**loss.terms, "auxk": term}, {**loss.weights, "auxk": objective.aux_coefficient}
    return Loss(terms, weights, loss.feature_acts)


def auxk(
    x: Float[Tensor, "batch d_in"],
    x_hat: Float[Tensor, "batch d_in"],
    b_dec: Float[Tensor, " d_in"],
    W_enc: Float[Tensor, "d_in dead"],
    b_enc: Float[Tensor, " dead"],
    W_dec: Float[Tensor, "dead d_in"],
    k_aux: int,
    relu: bool,
    peers: Peers = ALONE,
) -> Float[Tensor, ""]:
    """The AuxK term from the weights of the dead latents alone."""
    pre = (x - peers.shared(b_dec)) @ W_enc + b_enc
    if peers.several_shares or k_aux < pre.shape[1]:
        pre = peers.top(pre.detach(), k_aux).place(pre)
    if relu:
        pre = pre.relu()
    return ((x - x_hat) - peers.sum_latents(pre @ W_dec)).pow(2).mean()
