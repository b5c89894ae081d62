"""What becomes of latents from one dictionary to the next larger one, and which latents several dictionaries share.

A latent of the larger dictionary is a child of the latent of the smaller one whose decoder direction is nearest, if
their cosine reaches a threshold; otherwise it is new. Feature splitting: Bricken et al. 2023, "Towards
Monosemanticity". 0.7 is the cosine above which Leask et al. 2025, "Sparse Autoencoders Do Not Find Canonical Units of
Analysis", take two latents for versions of one another, and Paulo and Belrose 2025, "Sparse Autoencoders Trained on the
Same Data Learn Different Features", for the same latent under two seeds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.compare.match import Matches, match_both_ways
from mechint.errors import MechintError

THRESHOLD = 0.7


class Level(NamedTuple):
    """One dictionary of a tree. In the first level nothing has a parent, in the last nothing has children."""

    parent: Int[Tensor, " d_sae"]  # nearest latent of the level before, -1 where their cosine is below the threshold
    nearest: Int[Tensor, " d_sae"]  # the same without a threshold; -1 in the first level
    cosine: Float[Tensor, " d_sae"]  # with `nearest`; 0 in the first level
    n_children: Int[Tensor, " d_sae"]


class Step(NamedTuple):
    """From one level to the next, in numbers of latents."""

    lost: int  # of the smaller: no child
    kept: int  # of the smaller: one child
    split: int  # of the smaller: two or more children
    most_children: int
    new: int  # of the larger: no parent


class Tree(NamedTuple):
    """Dictionaries in the order in which they were given, usually by size."""

    levels: list[Level]
    threshold: float

    def step(self, level: int) -> Step:
        """From `level` to the level after it."""
        n = self.levels[level].n_children
        new = int((self.levels[level + 1].parent < 0).sum())
        return Step(int((n == 0).sum()), int((n == 1).sum()), int((n >= 2).sum()), int(n.max()), new)

    def children(self, level: int, latent: int) -> list[int]:
        """Latents of the next level whose parent this one is, nearest first; none in the last level."""
        self._check(level, latent)
        if level + 1 == len(self.levels):
            return []
        after = self.levels[level + 1]
        own = (after.parent == latent).nonzero().flatten()
        return own[after.cosine[own].argsort(descending=True, stable=True)].tolist()

    def ancestors(self, level: int, latent: int) -> list[int]:
        """Parent, its parent, ... as far as there are any."""
        self._check(level, latent)
        found = []
        while level > 0 and (latent := int(self.levels[level].parent[latent])) >= 0:
            found.append(latent)
            level -= 1
        return found

    def family(self, level: int, latent: int) -> list[list[int]]:
        """The latents that descend from this one, by level: [[latent], its children, theirs, ...]."""
        found = [[latent]]
        for below in range(level, len(self.levels) - 1):
            children = [child for one in found[-1] for child in self.children(below, one)]
            if not children:
                break
            found.append(children)
        return found

    def largest_families(self, n: int = 10) -> list[list[list[int]]]:
        """The families of the `n` latents of the first level with the most descendants, largest first."""
        total = torch.zeros(len(self.levels[-1].parent), dtype=torch.int64)  # descendants of each latent
        for above, level in zip(reversed(self.levels[:-1]), reversed(self.levels[1:]), strict=True):
            has = level.parent >= 0
            sizes = torch.zeros(len(above.parent), dtype=torch.int64)
            total = sizes.index_add_(0, level.parent[has], 1 + total[has])
        order = total.argsort(descending=True, stable=True)[:n]
        return [self.family(0, latent) for latent in order.tolist() if total[latent] > 0]

    def _check(self, level: int, latent: int) -> None:
        if not 0 <= level < len(self.levels):
            raise MechintError(f"level {level} is not among the {len(self.levels)} of this tree")
        d_sae = len(self.levels[level].parent)
        if not 0 <= latent < d_sae:
            raise MechintError(f"latent {latent} is not among the {d_sae} of level {level}: 0 to {d_sae - 1}")


def splitting_tree(
    decoders: Sequence[Float[Tensor, "_ d_in"]], *, threshold: float = THRESHOLD, block_size: int = 1024
) -> Tree:
    """The tree of two or more decoders, each a level of its own.

    Raises:
        MechintError: fewer than two decoders, another width, a threshold outside 0 to 1.
    """
    if len(decoders) < 2:
        raise MechintError(f"a splitting tree needs two or more dictionaries, got {len(decoders)}")
    widths = sorted({decoder.shape[1] for decoder in decoders})
    if len(widths) > 1:
        raise MechintError(f"latents of different widths cannot be compared: d_in {widths[0]} and {widths[-1]}")
    pairs = zip(decoders, decoders[1:], strict=False)
    back = [match_both_ways(small, large, block_size=block_size)[1] for small, large in pairs]
    return tree_of_matches([len(decoder) for decoder in decoders], back, threshold=threshold)


def tree_of_matches(sizes: Sequence[int], back: Sequence[Matches], *, threshold: float = THRESHOLD) -> Tree:
    """The tree from the number of latents of each level and the matches from each level to the one before."""
    check_threshold(threshold)
    nothing = torch.full((sizes[0],), -1, dtype=torch.int64)
    levels = [Level(nothing, nothing, torch.zeros(sizes[0]), torch.zeros(sizes[0], dtype=torch.int64))]
    for size, matches in zip(sizes[1:], back, strict=True):
        near = matches.cosine >= threshold
        parent = torch.where(near, matches.right_feature, -1)
        counts = torch.bincount(parent[near], minlength=len(levels[-1].parent))
        levels[-1] = levels[-1]._replace(n_children=counts)
        levels.append(Level(parent, matches.right_feature, matches.cosine, torch.zeros(size, dtype=torch.int64)))
    return Tree(levels, threshold)


class Sharing(NamedTuple):
    """Of each latent of one dictionary: in how many of the other dictionaries there is one like it."""

    n_with: Int[Tensor, " d_sae"]  # others in which the highest cosine reaches the threshold
    n_mutual: Int[Tensor, " d_sae"]  # of these, those in which each is the other's nearest
    n_others: int
    best_cosine: Float[Tensor, " d_sae"]  # over all others
    best_other: Int[Tensor, " d_sae"]  # the dictionary with it
    best_latent: Int[Tensor, " d_sae"]  # and its latent

    @property
    def shared(self) -> Bool[Tensor, " d_sae"]:
        """In every other dictionary."""
        return self.n_with == self.n_others

    @property
    def unique(self) -> Bool[Tensor, " d_sae"]:
        """In no other dictionary."""
        return self.n_with == 0


def sharing(sizes: Sequence[int], matches: Mapping[tuple[int, int], Matches], threshold: float) -> list[Sharing]:
    """`Sharing` of each of several dictionaries, from the matches (i, j) of every ordered pair of them."""
    check_threshold(threshold)
    found = []
    for i, size in enumerate(sizes):
        n_with, n_mutual = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
        best = torch.full((size,), -torch.inf)
        other, latent = torch.full((size,), -1, dtype=torch.int64), torch.full((size,), -1, dtype=torch.int64)
        for j in range(len(sizes)):
            if j == i:
                continue
            match = matches[i, j]
            near = match.cosine >= threshold
            n_with += near
            n_mutual += near & match.mutual_nearest
            higher = match.cosine > best
            best = torch.where(higher, match.cosine, best)
            other, latent = torch.where(higher, j, other), torch.where(higher, match.right_feature, latent)
        found.append(Sharing(n_with, n_mutual, len(sizes) - 1, best, other, latent))
    return found


def shared_latents(
    decoders: Sequence[Float[Tensor, "_ d_in"]], *, threshold: float = THRESHOLD, block_size: int = 1024
) -> list[Sharing]:
    """Which latents of each decoder the other decoders have too: seeds, expansions or architectures of one hook.

    Raises:
        MechintError: fewer than two decoders, a threshold outside 0 to 1.
    """
    if len(decoders) < 2:
        raise MechintError(f"sharing needs two or more dictionaries, got {len(decoders)}")
    matches: dict[tuple[int, int], Matches] = {}
    for j in range(len(decoders)):
        for i in range(j):
            matches[i, j], matches[j, i] = match_both_ways(decoders[i], decoders[j], block_size=block_size)
    return sharing([len(decoder) for decoder in decoders], matches, threshold)


def check_threshold(threshold: float) -> None:
    """Raise `MechintError` unless a cosine could lie on either side of it."""
    if not 0.0 < threshold <= 1.0:
        raise MechintError(f"--threshold must be above 0 and at most 1, got {threshold:g}")
