"""What every sparse autoencoder has: its tensors, decoding, the terms of its loss, and the form it is saved in.

An architecture is one final class in one file of `mechint/sae/architectures/`; defining it registers it (see
docs/extend.md). A subclass says how activations become `feature_acts` (`encode`), what training minimises (`loss`, in
plain autograd: the reference for every faster path), and what it is saved as.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mechint.errors import MechintError, nearest
from mechint.sae.peers import ALONE, Peers

# A row shorter than this is divided by this instead, so that an all-zero row stays finite.
MIN_DECODER_NORM = 1e-12

ARCHITECTURES: dict[str, type["SAE"]] = {}

SAEType = TypeVar("SAEType", bound="SAE")


@dataclass(frozen=True)
class Objective:
    """What one step minimises beside the squared error: the weights in force at this step, and what is dead."""

    sparsity: float = 0.0  # weight of the architecture's own penalty, warm-up included
    dead: Bool[Tensor, " d_sae"] | None = None  # latents to revive; None where nothing is to be revived
    k_aux: int = 0  # dead latents a vector that AuxK reconstructs the residual with
    aux_coefficient: float = 0.0
    widths: tuple[int, ...] | None = None  # nested prefixes of this step (matryoshka); None: the SAE's own


@dataclass(frozen=True)
class Loss:
    """Named terms and their weights; the loss is the weighted sum. `mse` is always there."""

    terms: dict[str, Float[Tensor, ""]]
    weights: dict[str, float]
    feature_acts: Float[Tensor, "batch d_sae"]

    @property
    def total(self) -> Float[Tensor, ""]:
        return weighted_sum(self.terms, self.weights)


def weighted_sum(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Float[Tensor, ""]:
    """The loss from its terms, summed in the order in which the terms are named."""
    parts = [weights[name] * term for name, term in terms.items()]
    return torch.stack(parts).sum() if len(parts) > 2 else sum(parts[1:], start=parts[0])


class SAE(nn.Module, ABC):
    """Base of all architectures: `x_hat = feature_acts @ W_dec + b_dec`, with `feature_acts = encode(x)`.

    Parameters: `W_enc [d_in, d_sae]`, `b_enc [d_sae]`, `W_dec [d_sae, d_in]`, `b_dec [d_in]`. Biases start at 0, the
    weights Xavier-normal and independent of each other, then the rows of `W_dec` are divided by their norms. Drawn from
    `generator` if given, else from torch's global one.

    `W_enc` lies column by column in memory: the encoder column of a latent is contiguous, as its decoder row is.

    `metadata` says what the SAE was trained on (hook_name, model_name, processing, prepend_bos, ...); empty if unknown.
    """

    architecture: ClassVar[str]
    # Settings of the architecture beside d_in and d_sae, with their defaults; keyword arguments of the class.
    options: ClassVar[dict[str, Any]] = {}
    # Those options that are numbers of latents, or tuples of them: a smaller SAE of the same kind has smaller ones.
    latent_counts: ClassVar[tuple[str, ...]] = ()
    # What its file holds, parameters and options; no two architectures hold the same, so that a checkpoint.pt alone
    # says what it is. Empty: never saved as such (its `saved_form` is another architecture).
    saved_tensors: ClassVar[tuple[str, ...]] = ()
    # Settings that only SAEs of other tools depart from: no flag reaches them, and a file holds one only where it is
    # another than this. SAELens's layout has no place for them.
    departures: ClassVar[dict[str, Any]] = {}
    # Whether AuxK takes only positive pre-activations: where selection, not a bias, keeps latents off (Gao et al.).
    aux_relu: ClassVar[bool] = False
    # Whether the decoder's row norms scale the penalty, so that decoder rows need not have unit norm.
    has_l1: ClassVar[bool] = False
    # Whether `Objective.sparsity` weighs anything: not where a number of latents decides how sparse codes are.
    has_penalty: ClassVar[bool] = True
    # Whether loss and encode ask `peers` wherever they sum over latents or choose between them, so that processes can
    # have a share of the latents each.
    shardable: ClassVar[bool] = False
    # Whether what a latent is depends on no other latent, so that `only` gives what `encode` gives.
    latents_are_independent: ClassVar[bool] = False

    # The processes that share a training step; while they share the latents, parameters hold this process's only.
    peers: Peers = ALONE

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        name = cls.__dict__.get("architecture")
        if name is None:  # what several architectures share
            return
        if ARCHITECTURES.get(name, cls).__qualname__ != cls.__qualname__:
            raise TypeError(f"two classes call themselves architecture {name!r}")
        ARCHITECTURES[name] = cls

    def __init__(self, d_in: int, d_sae: int, *, generator: torch.Generator | None = None):
        super().__init__()
        self.d_in, self.d_sae = d_in, d_sae
        if d_in < 1 or d_sae < 1:
            raise MechintError(f"an SAE needs d_in >= 1 and d_sae >= 1, got {d_in} and {d_sae}")
        self.W_enc = nn.Parameter(torch.empty(d_sae, d_in).t())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(torch.empty(d_sae, d_in))
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        # False: rows of W_dec are free, every penalty and selection weighs feature_acts by their norms, and saving
        # folds the norms into the encoder.
        self.unit_decoder = True
        self.metadata: dict[str, Any] = {}
        if self.W_enc.is_meta:  # shapes only, values come from a file; random ops on meta import torch's compiler
            return
        with torch.no_grad():  # drawn row by row, so that the numbers do not depend on the layout
            self.W_enc.copy_(nn.init.xavier_normal_(torch.empty(d_in, d_sae), generator=generator))
        nn.init.xavier_normal_(self.W_dec, generator=generator)
        self.renormalize_decoder()

    @classmethod
    def make(cls: type[SAEType], d_in: int, d_sae: int, **options: Any) -> SAEType:
        """The class from widths and options, whatever its own signature."""
        return cls(d_in, d_sae, **options)

    @abstractmethod
    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Activations to `feature_acts`, all >= 0, as the trained SAE computes them."""

    @abstractmethod
    def loss(self, x: Float[Tensor, "batch d_in"], objective: Objective) -> Loss:
        """The terms that training minimises on a batch, differentiable."""

    def pre_activations(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`(x - b_dec) @ W_enc + b_enc`."""
        return (x - self.peers.shared(self.b_dec)) @ self.W_enc + self.b_enc

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """`feature_acts` to reconstructed activations."""
        return self.peers.sum_latents(feature_acts @ self.W_dec) + self.b_dec

    def forward(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_sae"]]:
        """`(x_hat, feature_acts)`."""
        feature_acts = self.encode(x)
        return self.decode(feature_acts), feature_acts

    @property
    def looks_across_rows(self) -> bool:
        """Whether the loss of a row depends on the batch's other rows, so that processes that share one ask `peers`."""
        return False

    @property
    def wants_dead(self) -> bool:
        """Whether its own loss has a term over dead latents, so that `Objective.dead` has to name them."""
        return False

    def step_widths(self, seed: int, step: int) -> tuple[int, ...] | None:
        """`Objective.widths` of a step, a function of (seed, step); None where nothing is drawn."""
        return None

    @staticmethod
    def latent_dim(name: str, tensor: Tensor) -> int | None:
        """The dimension of a parameter or buffer that counts latents; None for what all latents share."""
        if name == "b_dec" or tensor.ndim == 0:
            return None
        return 1 if name == "W_enc" else 0

    def only(self, latents: slice) -> "SAE":
        """The SAE of these latents alone, over the same memory; to encode with, where `latents_are_independent`."""
        part = copy.copy(self)
        part._parameters = {}
        for name, parameter in self._parameters.items():
            if parameter is not None:
                dim = self.latent_dim(name, parameter)
                own = parameter if dim is None else parameter[:, latents] if dim else parameter[latents]
                part._parameters[name] = own  # type: ignore[assignment]
        part.d_sae = len(range(self.d_sae)[latents])
        return part

    def penalty_scale(self) -> Float[Tensor, " d_sae"] | None:
        """Norms of the decoder rows where they are free, None where they are all 1."""
        return None if self.unit_decoder else self.W_dec.norm(dim=1)

    @torch.no_grad()
    def constrain(self) -> None:
        """What holds after every step: decoder rows of unit norm. Architectures with more constraints extend it."""
        if self.unit_decoder:
            self.renormalize_decoder()

    @torch.no_grad()
    def renormalize_decoder(self) -> None:
        """Divide each row of `W_dec` by its norm, in place."""
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True).clamp_min(MIN_DECODER_NORM))

    def saved_form(self, input_scale: float = 1.0) -> "SAE":
        """A copy to save and apply: decoder rows of unit norm, for inputs that are not multiplied by `input_scale`.

        With f' = f / s, dividing every bias and threshold by s gives the SAE that does to x what this one does to s x:
        the weights stay as they are. With free decoder rows of norm n, f' = n f moves n into the encoder. Both change
        no reconstruction beyond rounding.
        """
        saved = self._inference_copy()
        with torch.no_grad():
            if not self.unit_decoder:
                norms = saved.W_dec.norm(dim=1).clamp_min(MIN_DECODER_NORM)
                saved.W_enc.mul_(norms)
                saved.W_dec.div_(norms[:, None])
                for name in saved.latent_offsets():
                    saved.get_parameter(name).mul_(norms)
                saved.unit_decoder = True
            if input_scale != 1.0:
                for name in ("b_dec", *saved.latent_offsets()):
                    saved.get_parameter(name).div_(input_scale)
        return saved

    def _inference_copy(self) -> "SAE":
        """A copy in the architecture that is saved; another class where training and saved form differ."""
        return copy.deepcopy(self)

    def latent_offsets(self) -> tuple[str, ...]:
        """Parameters `[d_sae]` in units of the pre-activations: they scale with the input."""
        return ("b_enc",)

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk, under the names of the field."""
        tensors = {name: tensor.detach().cpu().float().contiguous() for name, tensor in self.named_parameters()}
        options = {name: torch.tensor(getattr(self, name)) for name in self.saved_tensors if name in self.options}
        return tensors | options | {name: torch.tensor(value) for name, value in self.departing().items()}

    def departing(self) -> dict[str, Any]:
        """Those `departures` whose value here is not the usual one."""
        return {name: getattr(self, name) for name, usual in self.departures.items() if getattr(self, name) != usual}

    def extra_cfg(self) -> dict[str, Any]:
        """Keys of `cfg.json` that only this architecture has: its options that are in its file."""
        return {name: getattr(self, name) for name in self.saved_tensors if name in self.options}

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
        return sum(parameter.numel() for parameter in self.parameters())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # checkpoint.pt files call the decoder bias b_pre.
        if prefix + "b_pre" in state_dict:
            state_dict[prefix + "b_dec"] = state_dict.pop(prefix + "b_pre")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        where = self.metadata.get("hook_name")
        own = "".join(f", {name}={getattr(self, name)}" for name in (*self.options, *self.departing()))
        return f"{self.architecture}, d_in={self.d_in}, d_sae={self.d_sae}{own}" + (
            f", hook_name={where}" if where else ""
        )


# --- terms that architectures share -----------------------------------------------------------------------------------


def mean_squared_error(x: Float[Tensor, "batch d_in"], x_hat: Float[Tensor, "batch d_in"]) -> Float[Tensor, ""]:
    """Mean over batch and d_in."""
    return (x_hat - x).pow(2).mean()


def weighted_acts(sae: SAE, feature_acts: Float[Tensor, "batch d_sae"]) -> Float[Tensor, "batch d_sae"]:
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


def build_sae(
    architecture: str,
    d_in: int,
    d_sae: int,
    *,
    generator: torch.Generator | None = None,
    options: Mapping[str, Any] | None = None,
) -> SAE:
    """A new SAE by the name of its architecture. Raises `MechintError` for unknown names and options."""
    cls = find_architecture(architecture)
    for name in options or {}:
        if name not in cls.options:
            having = [other for other, kind in ARCHITECTURES.items() if name in kind.options]
            raise MechintError(
                f"--{name.replace('_', '-')} does not apply to architecture {architecture!r}"
                + (f", only to {', '.join(having)}" if having else "")
            )
    return cls.make(d_in, d_sae, generator=generator, **(options or {}))


def find_architecture(name: str) -> type[SAE]:
    """The class of an architecture. Raises `MechintError` with the nearest name for an unknown one."""
    if name not in ARCHITECTURES:
        raise MechintError(f"unknown architecture {name!r}; {nearest(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]
