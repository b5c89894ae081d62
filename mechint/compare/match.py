"""For each latent of one dictionary the nearest of another, by the cosine of decoder directions, in blocks."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Matches(NamedTuple):
    """For each left row its best right row."""

    right_feature: Int[Tensor, " left"]
    cosine: Float[Tensor, " left"]
    mutual_nearest: Bool[Tensor, " left"]


def match_directions(
    left: Float[Tensor, "left d_in"], right: Float[Tensor, "right d_in"], *, block_size: int = 1024
) -> Matches:
    """For every row of `left` the row of `right` with the highest cosine, and whether each is the other's best.

    Equal cosines go to the lowest index. A zero row has cosine 0 with everything and is nobody's mutual nearest. Memory
    is a few blocks of `block_size` x `block_size`; the whole `left x right` matrix never exists.

    Blocks are multiplied in float64 and rounded to float32: equal rows then tie exactly, where in float32 the same dot
    product can come out different in another column of the block.
    """
    return match_both_ways(left, right, block_size=block_size)[0]


def match_both_ways(
    left: Float[Tensor, "left d_in"], right: Float[Tensor, "right d_in"], *, block_size: int = 1024
) -> tuple[Matches, Matches]:
    """`match_directions` from left to right and from right to left, for the price of one."""
    best = torch.full((len(left),), -torch.inf)
    best_index = torch.zeros(len(left), dtype=torch.int64)
    back = torch.full((len(right),), -torch.inf)
    back_index = torch.zeros(len(right), dtype=torch.int64)
    for left_start in range(0, len(left), block_size):
        rows = slice(left_start, left_start + block_size)
        left_block = _unit_rows(left[rows])
        for right_start in range(0, len(right), block_size):
            columns = slice(right_start, right_start + block_size)
            cosine = (left_block @ _unit_rows(right[columns]).T).float()
            _raise_best(best[rows], best_index[rows], *cosine.max(dim=1), offset=right_start)
            _raise_best(back[columns], back_index[columns], *cosine.max(dim=0), offset=left_start)
    left_there, right_there = (left != 0).any(dim=1), (right != 0).any(dim=1)

    def matches(best: Tensor, index: Tensor, back_index: Tensor, there: Tensor, there_too: Tensor) -> Matches:
        mutual = (back_index[index] == torch.arange(len(index))) & there & there_too[index]
        return Matches(index, best.clamp(-1.0, 1.0), mutual)

    return (
        matches(best, best_index, back_index, left_there, right_there),
        matches(back, back_index, best_index, right_there, left_there),
    )


def _unit_rows(rows: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
    return torch.nn.functional.normalize(rows.double(), dim=1, eps=1e-30)


def _raise_best(
    best: Float[Tensor, " n"],
    best_index: Int[Tensor, " n"],
    value: Float[Tensor, " n"],
    index: Int[Tensor, " n"],
    *,
    offset: int,
) -> None:
    """Write `value` and `index + offset` where `value` is higher, in place; `max` and `>` keep the lowest index."""
    higher = value > best
    best[higher] = value[higher]
    best_index[higher] = index[higher] + offset


def cosine_by_chance(right: Float[Tensor, "right d_in"], *, n: int = 512, seed: int = 0) -> float:
    """Median over `n` random directions of the highest cosine with a row of `right`: what no relation looks like.

    It grows with the number of rows and falls with d_in, about sqrt(2 ln(rows) / d_in).
    """
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n, right.shape[1], generator=generator)
    return float(match_directions(directions, right).cosine.median())
