"""Which checkpoints of a sweep are worth publishing: the Pareto frontier of sparsity against error, thinned.

A checkpoint is *dominated* if another one is no denser and no worse, and better in one of the two. Of a layer's
frontier the sparsest and the densest always stay; between them go the points nearest to equal steps of log L0.
"""

import datetime
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mechint.errors import MechintError

DEFAULT_PER_LAYER = 6


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that could be published.

    Attributes:
        run_id: of the run that trained it; the name of its folder.
        layer: of the model, that it was trained on.
        l0: mean number of active latents, above 0.
        nmse: sum of squared errors / sum of squares about the mean; 0 is perfect.
        date: when the run started, ISO 8601; the later one wins a tie. Unknown is empty and loses.
        activation: how its activation function is configured, as its run records it.
    """

    run_id: str
    layer: int
    l0: float
    nmse: float
    date: str = ""
    activation: Mapping[str, Any] = field(default_factory=dict)


def pareto(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The candidates that no other one dominates, by rising L0 (and so by falling NMSE).

    Of several with one L0 and one NMSE the latest stays, and of those the last run id, so that the order in which they
    are given does not matter.
    """
    found: list[Candidate] = []
    for candidate in _ranked(candidates):
        if not found or candidate.nmse < found[-1].nmse:
            found.append(candidate)
    return found


def select(candidates: Iterable[Candidate], max_count: int = DEFAULT_PER_LAYER) -> list[Candidate]:
    """At most `max_count` points of the frontier, by rising L0: both ends, and between them those nearest to the
    quantiles of the log-L0 range. Of two equally near the one with the lower NMSE is taken.

    Raises:
        MechintError: `max_count` below 2, which cannot hold both ends; an L0 that has no logarithm.
    """
    if max_count < 2:
        raise MechintError(
            f"--max-per-layer {max_count}: the sparsest and the densest checkpoint always stay; give >= 2"
        )
    frontier = pareto(candidates)
    if odd := [c.run_id for c in frontier if not (c.l0 > 0 and math.isfinite(c.l0) and math.isfinite(c.nmse))]:
        raise MechintError(f"run {odd[0]}: L0 should be a number above 0 and NMSE a finite one")
    if len(frontier) <= max_count:
        return frontier
    first, last = frontier[0], frontier[-1]
    low, high = math.log(first.l0), math.log(last.l0)
    free, chosen = frontier[1:-1], [first, last]
    for step in range(1, max_count - 1):
        target = low + (high - low) * step / (max_count - 1)
        # rounded: two that are equally near should not be told apart by the last bit of a logarithm
        nearest = min(free, key=lambda c, target=target: (round(abs(math.log(c.l0) - target), 9), c.nmse))
        free.remove(nearest)
        chosen.append(nearest)
    return _ranked(chosen)


def select_layers(
    candidates: Iterable[Candidate], max_per_layer: int = DEFAULT_PER_LAYER
) -> dict[int, list[Candidate]]:
    """`select` of each layer, under its number, by rising layer."""
    groups: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(candidate.layer, []).append(candidate)
    return {layer: select(groups[layer], max_per_layer) for layer in sorted(groups)}


def flat(layers: Mapping[int, Sequence[Candidate]]) -> list[Candidate]:
    """All chosen candidates, by layer and rising L0."""
    return [candidate for layer in sorted(layers) for candidate in layers[layer]]


def _ranked(candidates: Iterable[Candidate]) -> list[Candidate]:
    """By L0, then NMSE, then the later date first, then the later run id first."""
    latest_first = sorted(candidates, key=lambda c: (when(c.date), c.run_id), reverse=True)
    return sorted(latest_first, key=lambda c: (c.l0, c.nmse))


def when(date: str) -> float:
    """Seconds since 1970 of an ISO date (without a zone: UTC); what is none counts as before all others."""
    try:
        moment = datetime.datetime.fromisoformat(date)
    except ValueError:
        return -math.inf
    return moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
