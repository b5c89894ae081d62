"""The original pipeline's class and loss, for code that was written for them. New code takes `mechint.SAE`.

The second number of `SparseAutoEncoder(d, m)` is the number of latents. Earlier versions of this package took an
expansion factor there, so a call that looks like one is refused: a keyword other than `d` and `m`, no second number, or
a second one that makes no sparse autoencoder: given by position, at most 64, and at most an eighth of a width of at
least 64. Whoever wants so few latents says `m=8`.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from mechint.errors import MechintError
from mechint.sae.architectures.standard import StandardSAE

LARGEST_EXPANSION = SMALLEST_WIDTH = 64
DIMENSIONS_A_LATENT = 8


def _refuses_expansions(init: Callable[..., None]) -> Callable[..., None]:
    """`init(self, d, m)` with one line for whoever calls it by the other convention."""

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        given = ", ".join([*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())])
        named = dict(zip(("d", "m"), args, strict=False)) | kwargs
        if named.keys() != {"d", "m"} or len(args) + len(kwargs) != 2:
            raise MechintError(
                f"SparseAutoEncoder takes d, the width, and m, the number of latents, not ({given}): write"
                f" {_as_meant(named)}; settings beside them are those of mechint.sae.StandardSAE"
            )
        if len(args) == 2 and _looks_like_an_expansion(*args):
            d, m = args
            raise MechintError(
                f"SparseAutoEncoder({given}) would have {m} latents for {d} dimensions: the second number is the"
                f" number of latents, not an expansion; write SparseAutoEncoder({d}, {d * m}), or"
                f" SparseAutoEncoder({d}, m={m}) if so few are meant"
            )
        init(self, *args, **kwargs)

    return checked


def _looks_like_an_expansion(d: int, m: int) -> bool:
    return d >= SMALLEST_WIDTH and 1 < m <= LARGEST_EXPANSION and DIMENSIONS_A_LATENT * m <= d


def _as_meant(named: dict[str, Any]) -> str:
    """The call as it should be, from the names that other versions of the class had."""
    d = next((named[name] for name in ("d", "activation_dim", "d_in") if name in named), None)
    m = next((named[name] for name in ("m", "d_sae", "num_features") if name in named), None)
    if m is None and isinstance(d, int) and isinstance(named.get("expansion", 8), int):
        m = d * named.get("expansion", 8)  # 8 was its default
    return f"SparseAutoEncoder({'d' if d is None else d}, {'m' if m is None else m})"


class SparseAutoEncoder(StandardSAE):
    """The original's class: `SparseAutoEncoder(d, m)` has `m` latents, and a call gives `(x_hat, feature_acts)`.

    `b_pre`, `b_enc`, `W_enc` and `W_dec` are its parameters and the keys of its state dict. Everything of this package
    takes it as it takes any other SAE.
    """

    @_refuses_expansions
    def __init__(self, d: int, m: int):
        super().__init__(d, m)

    @classmethod
    def of(cls, sae: StandardSAE) -> "SparseAutoEncoder":
        """The same SAE, its parameters shared, with the old call and the old state dict."""
        legacy = object.__new__(cls)
        vars(legacy).update(vars(sae))
        return legacy

    @property
    def b_pre(self) -> nn.Parameter:
        """`b_dec` under its old name."""
        return self.b_dec

    def encoder(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """`encode` under its old name."""
        return self.encode(x)

    def decoder(self, f: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """`decode` under its old name."""
        return self.decode(f)

    def forward(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[Float[Tensor, "*batch d_in"], Float[Tensor, "*batch d_sae"]]:
        """`(x_hat, feature_acts)`."""
        return self.run(x)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "b_pre"] = destination.pop(prefix + "b_dec")


def SAEloss(
    xhat: Float[Tensor, "*batch d_in"],
    x: Float[Tensor, "*batch d_in"],
    f: Float[Tensor, "*batch d_sae"],
    lam: float = 1e-3,
) -> Float[Tensor, ""]:
    """`mse + lam * l1`, both means over all their elements.

    So `lam` equals a per-token-sum coefficient times `d_sae / d_in`: it is not comparable with that of tools which sum.
    """
    return nn.functional.mse_loss(xhat, x) + lam * f.abs().mean()
