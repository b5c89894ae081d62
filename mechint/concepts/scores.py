"""How well single latents tell concepts: F1 at a threshold chosen elsewhere, AUROC, where a latent's activation lies.

Counting is a product: with G [entries of a latent between two thresholds, rows] and labels Y [rows, concepts], G Y
holds how often each concept stands between each pair of thresholds of each latent, for all of them at once.
docs/concepts.md states every formula.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechint.concepts.codes import Codes

# Share of a latent's active rows that each tried threshold keeps; 1 keeps all ("active at all").
KEPT_SHARES = (1.0, 0.85, 0.7, 0.55, 0.42, 0.32, 0.24, 0.18, 0.13, 0.1, 0.07, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)
# Latents of each concept whose thresholds are then searched over all values.
N_REFINED = 8
# Rows with the largest values that `top_share` looks at.
N_TOP_ROWS = 20


class Thresholds(NamedTuple):
    """`values[j, t]`: latent j counts as on where its value is >= this; falling shares of its active rows stay on."""

    values: Float[np.ndarray, "d_sae n_thresholds"]


class Counts(NamedTuple):
    """Rows on which latents are on, per threshold, in all and with each concept."""

    on: Int[np.ndarray, "d_sae n_thresholds"]
    hits: Float[np.ndarray, "d_sae n_thresholds concepts"]  # whole numbers
    positives: Int[np.ndarray, " concepts"]
    n_rows: int

    def f1(self) -> Float[np.ndarray, "d_sae n_thresholds concepts"]:
        """2 TP / (2 TP + FP + FN) = 2 hits / (on + positives)."""
        return 2 * self.hits / np.maximum(self.on[..., None] + self.positives, 1).astype(np.float32)


class Best(NamedTuple):
    """The latent and threshold that tell each concept best on the rows they were chosen on."""

    latent: Int[np.ndarray, " concepts"]
    threshold: Float[np.ndarray, " concepts"]

    def pairs(self) -> list[tuple[int, float]]:
        """(latent, threshold) of each concept."""
        return list(zip(self.latent.tolist(), self.threshold.tolist(), strict=True))


class Scores(NamedTuple):
    """Of one latent and threshold per concept, on the rows that are reported on."""

    f1: Float[np.ndarray, " concepts"]
    precision: Float[np.ndarray, " concepts"]
    recall: Float[np.ndarray, " concepts"]


def choose_thresholds(codes: Codes) -> Thresholds:
    """Per latent, the values that keep KEPT_SHARES of its active rows; a latent that is never active gets infinity."""
    counts = codes.counts()
    place = np.ceil(counts[:, None] * np.array(KEPT_SHARES)).astype(np.int64) - 1
    place = np.clip(codes.starts[:-1, None] + np.maximum(place, 0), 0, max(len(codes.values) - 1, 0))
    if not len(codes.values):
        return Thresholds(np.full((codes.d_sae, len(KEPT_SHARES)), np.inf, dtype=np.float32))
    values = codes.values[place]
    # "active at all" holds for values on the other rows too that are smaller than any seen here
    values[:, 0] = np.finfo(np.float32).tiny
    values[counts == 0] = np.inf
    return Thresholds(values)


def count(codes: Codes, labels: Float[np.ndarray, "rows concepts"], thresholds: Thresholds) -> Counts:
    """Count, for every latent, threshold and concept, the rows on which both are on."""
    n_thresholds = thresholds.values.shape[1]
    ends = np.empty((codes.d_sae, n_thresholds), dtype=np.int64)  # entries before it are >= the threshold
    for latent in range(codes.d_sae):
        _, values = codes.of(latent)
        ends[latent] = np.searchsorted(-values, -thresholds.values[latent], side="right")
    hits = np.zeros((codes.d_sae, n_thresholds, labels.shape[1]), dtype=np.float32)
    # Thresholds fall from the last to the first: entries between two of them are one line of the sparse matrix.
    bounds = np.concatenate([ends[:, ::-1], codes.counts()[:, None]], axis=1) + codes.starts[:-1, None]
    starts = np.concatenate([codes.starts[:-1, None], bounds], axis=1)
    for first in range(0, codes.d_sae, 4096):
        last = min(first + 4096, codes.d_sae)
        indptr = np.append(starts[first:last, :-1].reshape(-1), starts[last - 1, -1])
        offset = indptr[0]
        lines = Codes(indptr - offset, codes.rows[offset : indptr[-1]], codes.values[offset : indptr[-1]], codes.n_rows)
        found = lines.times(labels, np.ones(len(lines.rows), dtype=np.float32))
        found = found.reshape(last - first, n_thresholds + 1, -1)[:, :-1]  # what is below every threshold is dropped
        hits[first:last] = found.cumsum(axis=1)[:, ::-1]
    positives = np.rint(labels.sum(axis=0, dtype=np.float64)).astype(np.int64)
    return Counts(ends, hits, positives, codes.n_rows)


def choose_best(codes: Codes, labels: Bool[np.ndarray, "rows concepts"], counts: Counts) -> Best:
    """Per concept, the latent with the highest F1: N_REFINED candidates by `counts`, each at its own best threshold."""
    at_best = counts.f1().max(axis=1)  # [d_sae, concepts]
    n_concepts = labels.shape[1]
    latent, threshold = np.zeros(n_concepts, dtype=np.int64), np.full(n_concepts, np.inf)
    for concept in range(n_concepts):
        best = -1.0
        for candidate in np.argsort(-at_best[:, concept], kind="stable")[:N_REFINED]:
            f1, at = best_threshold(codes, int(candidate), labels[:, concept])
            if f1 > best:
                best, latent[concept], threshold[concept] = f1, candidate, at
    return Best(latent, threshold)


def best_threshold(codes: Codes, latent: int, label: Bool[np.ndarray, " rows"]) -> tuple[float, float]:
    """(F1, threshold) of a latent at the best of all thresholds; ties in value stay together.

    The threshold is halfway between the last value that is on and the next one; half the last value if none follows.
    """
    rows, values = codes.of(latent)
    if not len(rows):
        return 0.0, float("inf")
    hits = np.cumsum(label[rows])
    f1 = 2 * hits / (np.arange(1, len(rows) + 1) + int(label.sum()))
    last_of_tie = np.append(values[1:] < values[:-1], True)
    f1 = np.where(last_of_tie, f1, -1.0)
    place = int(f1.argmax())
    below = values[place + 1] if place + 1 < len(values) else 0.0
    return float(f1[place]), float((float(values[place]) + float(below)) / 2)


def score(codes: Codes, labels: Bool[np.ndarray, "rows concepts"], best: Best) -> Scores:
    """F1, precision and recall of the chosen latent of each concept on these rows; 0 where nothing is on."""
    found = np.array([_hits(codes, labels[:, c], *pair) for c, pair in enumerate(best.pairs())])
    hits, on, positives = found.reshape(-1, 3).T
    return Scores(2 * hits / np.maximum(on + positives, 1), hits / np.maximum(on, 1), hits / np.maximum(positives, 1))


def _hits(codes: Codes, label: np.ndarray, latent: int, threshold: float) -> tuple[int, int, int]:
    rows = rows_on(codes, latent, threshold)
    return int(label[rows].sum()), len(rows), int(label.sum())


def rows_on(codes: Codes, latent: int, threshold: float) -> Int[np.ndarray, " on"]:
    """The rows on which a latent is at or above a threshold."""
    rows, values = codes.of(latent)
    return rows[: int(np.searchsorted(-values, -threshold, side="right"))]


def auroc(scores: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"]) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2, from ranks; NaN with only one of them there."""
    from scipy.stats import rankdata

    n_positive = int(label.sum())
    n_negative = len(label) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[label].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def latent_auroc(codes: Codes, latent: int, label: Bool[np.ndarray, " rows"]) -> float:
    """`auroc` of a latent's value from its active rows only: all others are one tie at 0."""
    from scipy.stats import rankdata

    rows, values = codes.of(latent)
    n_positive = int(label.sum())
    n_negative = len(label) - n_positive
    if not n_positive or not n_negative:
        return float("nan")
    n_silent = codes.n_rows - len(rows)
    hit = label[rows]
    silent_positives = n_positive - int(hit.sum())
    ranks = float((rankdata(values)[hit] + n_silent).sum()) + silent_positives * (n_silent + 1) / 2
    return (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def coarse_auroc(counts: Counts) -> Float[np.ndarray, "d_sae concepts"]:
    """AUROC of every latent for every concept, values between two thresholds taken as ties (trapezoids)."""
    negatives = (counts.n_rows - counts.positives).astype(np.float64)
    true = counts.hits.astype(np.float64)
    false = counts.on[..., None] - true
    rate = true[:, ::-1] / np.maximum(counts.positives, 1)
    false_rate = false[:, ::-1] / np.maximum(negatives, 1)
    edge = np.zeros((len(rate), 1, rate.shape[2]))
    y = np.concatenate([edge, rate, edge + 1], axis=1)
    x = np.concatenate([edge, false_rate, edge + 1], axis=1)
    return ((y[:, 1:] + y[:, :-1]) / 2 * np.diff(x, axis=1)).sum(axis=1)


class Place(NamedTuple):
    """Where a latent's activation lies: the share of its sum, and of its strongest rows, within each concept."""

    mass: Float[np.ndarray, "d_sae concepts"]
    top: Float[np.ndarray, "d_sae concepts"]


def place_of_activation(codes: Codes, labels: Float[np.ndarray, "rows concepts"]) -> Place:
    """Shares within each concept of every latent's activation mass and of its N_TOP_ROWS rows of largest value.

    NaN for latents that are never active.
    """
    counts = codes.counts()
    with np.errstate(invalid="ignore", divide="ignore"):
        mass = (
            codes.times(labels)
            / np.add.reduceat(
                np.append(codes.values.astype(np.float64), 0.0), np.minimum(codes.starts[:-1], len(codes.values))
            )[:, None]
        )
        mass[counts == 0] = np.nan
        top = np.full_like(mass, np.nan)
        for latent in np.flatnonzero(counts):
            top[latent] = labels[codes.of(int(latent))[0][:N_TOP_ROWS]].mean(axis=0)
    return Place(mass.astype(np.float64), top)
