"""Learned decoder rows against the true directions of a synthetic dictionary."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.errors import MechintError

RECOVERED_AT = 0.9


class Matching(NamedTuple):
    """How well learned directions match true ones.

    Attributes:
        mmcs: mean over true directions of the largest cosine that a learned one has (mean max cosine similarity;
            Sharkey, Braun and Millidge 2022).
        mmcs_learned: the same over learned directions: how much of what was learned is true.
        mcc: mean cosine of the one-to-one matching that makes it largest (Hungarian algorithm), over its
            min(n_learned, n_true) pairs (mean correlation coefficient; Song et al. 2025, arXiv 2505.20254).
        uniqueness: different true directions among the learned ones' nearest, divided by the number of learned ones.
        recovered: share of true directions with a learned one of cosine RECOVERED_AT or more.
        learned, true: the matched pairs.
        cosines: their cosines (signed).
    """

    mmcs: float
    mmcs_learned: float
    mcc: float
    uniqueness: float
    recovered: float
    learned: Int[Tensor, " pairs"]
    true: Int[Tensor, " pairs"]
    cosines: Float[Tensor, " pairs"]

    def summary(self) -> dict[str, Any]:
        """The numbers without the pairs."""
        return {name: getattr(self, name) for name in ("mmcs", "mmcs_learned", "mcc", "uniqueness", "recovered")}


def match_directions(
    learned: Float[Tensor, "n_learned d_in"], true: Float[Tensor, "n_true _"], *, signed: bool = False
) -> Matching:
    """Match rows of `W_dec` with true directions by cosine; lengths do not matter.

    Args:
        signed: an opposite direction is no match. Without it |cosine| counts, as in the works cited.

    Raises:
        MechintError: no direction, or different widths.
    """
    from scipy.optimize import linear_sum_assignment

    if not len(learned) or not len(true) or learned.shape[1] != true.shape[1]:
        raise MechintError(
            f"cannot match {len(learned)} learned directions of width {learned.shape[1]} with {len(true)} true ones of"
            f" width {true.shape[1]}: both need the same width, and at least one direction"
        )
    cosines = _unit(learned) @ _unit(true).T
    score = cosines if signed else cosines.abs()
    pairs = [torch.from_numpy(index).long() for index in linear_sum_assignment(score.numpy(), maximize=True)]
    best_of_true = score.amax(dim=0)
    return Matching(
        mmcs=float(best_of_true.mean()),
        mmcs_learned=float(score.amax(dim=1).mean()),
        mcc=float(score[pairs[0], pairs[1]].mean()),
        uniqueness=len(score.argmax(dim=1).unique()) / len(learned),
        recovered=float((best_of_true >= RECOVERED_AT).double().mean()),
        learned=pairs[0],
        true=pairs[1],
        cosines=cosines[pairs[0], pairs[1]].float(),
    )


def _unit(rows: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_in"]:
    """In float64, so that 1 is 1; a row of zeros stays one."""
    rows = rows.detach().cpu().double()
    return rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-300)
