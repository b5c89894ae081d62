"""How concepts are spread over latents: splitting into several, and absorption of a parent's latent by a child's.

docs/concepts.md states both definitions; they follow Chanin et al. 2024, "A is for Absorption", with labels in place of
its first-letter probes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechint.concepts.codes import Codes
from mechint.concepts.scores import Best, Counts, rows_on

# A further latent counts as part of a concept if it adds more than this to F1 (Chanin et al. use the same step).
MIN_GAIN = 0.03
MOST_LATENTS = 12
# Latents tried as further ones: those of highest F1, and those of highest recall among the precise ones.
N_TRIED = 32
PRECISE = 0.5
# A parent whose latents reach no F1 of this has nothing that could be absorbed.
MIN_PARENT_F1 = 0.5


class Detector(NamedTuple):
    """ "On" where at least one of the latents is at or above its threshold."""

    latents: tuple[int, ...]
    thresholds: tuple[float, ...]

    def on(self, codes: Codes) -> Bool[np.ndarray, " rows"]:
        mask = np.zeros(codes.n_rows, dtype=bool)
        for latent, threshold in zip(self.latents, self.thresholds, strict=True):
            mask[rows_on(codes, latent, threshold)] = True
        return mask


def f1_of(on: Bool[np.ndarray, " rows"], label: Bool[np.ndarray, " rows"]) -> float:
    """2 TP / (2 TP + FP + FN); 0 where neither is ever on."""
    return float(2 * (on & label).sum() / max(int(on.sum()) + int(label.sum()), 1))


def split_detector(
    codes: Codes, label: Bool[np.ndarray, " rows"], first: tuple[int, float], tried: Sequence[int]
) -> Detector:
    """The latents that a concept is split over: from its best one on, add the one that raises F1 of "any is on" most.

    Each is added at the threshold that is best beside those already there; ends when the gain is MIN_GAIN or less.
    """
    latents, thresholds = [first[0]], [first[1]]
    on = np.zeros(codes.n_rows, dtype=bool)
    on[rows_on(codes, *first)] = True
    n_label = int(label.sum())
    f1 = f1_of(on, label)
    while len(latents) < MOST_LATENTS:
        base_hits, base_on = int((on & label).sum()), int(on.sum())
        best, best_f1 = None, f1 + MIN_GAIN
        for latent in tried:
            rows, values = codes.of(latent)
            if latent in latents or not len(rows):
                continue
            new = ~on[rows]
            hits, n_on = base_hits + np.cumsum(new & label[rows]), base_on + np.cumsum(new)
            found = 2 * hits / (n_on + n_label)
            found[:-1][values[1:] == values[:-1]] = -1.0  # a threshold does not part equal values
            place = int(found.argmax())
            if found[place] > best_f1:
                below = float(values[place + 1]) if place + 1 < len(values) else 0.0
                best, best_f1 = (latent, (float(values[place]) + below) / 2), float(found[place])
        if best is None:
            break
        latents.append(best[0])
        thresholds.append(best[1])
        on[rows_on(codes, *best)] = True
        f1 = best_f1
    return Detector(tuple(latents), tuple(thresholds))


def candidates(counts: Counts) -> Int[np.ndarray, "concepts tried"]:
    """Latents worth trying as further ones of each concept (see N_TRIED)."""
    f1 = counts.f1().max(axis=1)
    precise = counts.hits >= PRECISE * np.maximum(counts.on[..., None], 1)
    recall = (counts.hits * precise).max(axis=1)
    n = min(N_TRIED, len(f1))
    return np.concatenate([np.argsort(-f1, axis=0)[:n], np.argsort(-recall, axis=0)[:n]]).T


def split_all(codes: Codes, labels: Bool[np.ndarray, "rows concepts"], best: Best, counts: Counts) -> list[Detector]:
    """`split_detector` of every concept, on the rows to choose on."""
    tried = candidates(counts)
    return [
        split_detector(codes, labels[:, c], first, list(dict.fromkeys(tried[c].tolist())))
        for c, first in enumerate(best.pairs())
    ]


class Absorption(NamedTuple):
    """Of a child's tokens: the share where its parent's latents are silent, and where the child's stand in for them."""

    child: int
    parent: int
    rate: float
    silent: float
    silent_elsewhere: float  # the same share on the parent's other tokens
    n_tokens: int
    latents: tuple[int, ...]  # those that stand in


def child_specific(
    codes: Codes,
    label: Bool[np.ndarray, " rows"],
    child: Detector,
    parent: Detector,
    cosines: Float[np.ndarray, " d_sae"],
    min_cosine: float,
) -> Detector:
    """The child's latents that could absorb the parent's: none of the parent's own, at least PRECISE of their firing on
    the child's tokens, and a decoder row that points along the parent's direction."""
    kept = []
    for latent, threshold in zip(child.latents, child.thresholds, strict=True):
        rows = rows_on(codes, latent, threshold)
        precise = len(rows) and label[rows].mean() >= PRECISE
        if latent not in parent.latents and precise and cosines[latent] >= min_cosine:
            kept.append((latent, threshold))
    return Detector(tuple(latent for latent, _ in kept), tuple(threshold for _, threshold in kept))


def absorption(
    select: tuple[Codes, Bool[np.ndarray, "rows concepts"]],
    report: tuple[Codes, Bool[np.ndarray, "rows_2 concepts"]],
    detectors: Sequence[Detector],
    pairs: Mapping[int, int],
    cosines: Float[np.ndarray, "concepts d_sae"],
    min_cosine: float,
) -> list[Absorption]:
    """How often a child's latent fires in place of its parent's, for each (child: parent) of `pairs`.

    On the child's tokens of the report rows: `rate` is the share on which every latent of the parent's detector is
    silent and one of `child_specific` fires. Pairs whose parent reaches no F1 of MIN_PARENT_F1 are left out: it has no
    latents to be silent.

    Args:
        select, report: codes and labels; detectors and specific latents were chosen on the first.
        cosines: of each decoder row with each concept's direction.
    """
    (chosen, chosen_labels), (codes, labels) = select, report
    found = []
    parents_on = {parent: detectors[parent].on(codes) for parent in set(pairs.values())}
    for child, parent in pairs.items():
        on = parents_on[parent]
        if f1_of(on, labels[:, parent]) < MIN_PARENT_F1:
            continue
        specific = child_specific(
            chosen, chosen_labels[:, child], detectors[child], detectors[parent], cosines[parent], min_cosine
        )
        of_child = labels[:, child]
        others = labels[:, parent] & ~of_child
        silent = of_child & ~on
        absorbed = silent & specific.on(codes)
        n = max(int(of_child.sum()), 1)
        found.append(
            Absorption(
                child,
                parent,
                int(absorbed.sum()) / n,
                int(silent.sum()) / n,
                float((~on)[others].mean()) if others.any() else float("nan"),
                n,
                specific.latents,
            )
        )
    return found
