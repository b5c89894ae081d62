"""Dictionaries beside one another: matches of their latents, what splits from size to size, what they share."""

from mechint.compare.command import COLUMNS, Comparison, PairSummary, compare_all, compare_checkpoints
from mechint.compare.match import Matches, cosine_by_chance, match_both_ways, match_directions
from mechint.compare.tree import Level, Sharing, Step, Tree, shared_latents, splitting_tree

__all__ = [
    "COLUMNS",
    "Comparison",
    "Level",
    "Matches",
    "PairSummary",
    "Sharing",
    "Step",
    "Tree",
    "compare_all",
    "compare_checkpoints",
    "cosine_by_chance",
    "match_both_ways",
    "match_directions",
    "shared_latents",
    "splitting_tree",
]
