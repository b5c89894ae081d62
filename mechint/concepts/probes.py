"""Sparse probing: how much k latents together tell of a concept, against a probe on the activations themselves.

After Gurnee et al. 2023, "Finding Neurons in a Haystack", with the choice of latents by difference of means as in
SAEBench (Karvonen et al. 2025), here divided by the latent's standard deviation.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from mechint.concepts.codes import Codes
from mechint.concepts.scores import auroc

KS = (1, 2, 5, 10, 20)
# Most rows of each kind that a probe is fitted on and measured on.
FIT_POSITIVES, FIT_NEGATIVES = 2000, 4000
TEST_POSITIVES, TEST_NEGATIVES = 4000, 12000


class Sample(NamedTuple):
    """Rows that the probes of one concept are fitted on (of the rows to choose on) and measured on (of the others)."""

    fit: Int[np.ndarray, " n"]
    fit_label: Bool[np.ndarray, " n"]
    test: Int[np.ndarray, " m"]
    test_label: Bool[np.ndarray, " m"]


def sample_rows(select: Bool[np.ndarray, " n"], report: Bool[np.ndarray, " m"], seed: int) -> Sample:
    """A random sample of a concept's positives and negatives from both sets of rows, drawn without repeats."""
    rng = np.random.default_rng(seed)
    fit = _draw(rng, select, FIT_POSITIVES, FIT_NEGATIVES)
    test = _draw(rng, report, TEST_POSITIVES, TEST_NEGATIVES)
    return Sample(fit, select[fit], test, report[test])


def _draw(rng: np.random.Generator, label: np.ndarray, n_positive: int, n_negative: int) -> np.ndarray:
    parts = []
    for which, most in ((label, n_positive), (~label, n_negative)):
        rows = np.flatnonzero(which)
        parts.append(rng.choice(rows, min(most, len(rows)), replace=False))
    return np.sort(np.concatenate(parts))


def separations(
    codes: Codes, labels: Float[np.ndarray, "rows concepts"]
) -> tuple[Float[np.ndarray, "d_sae concepts"], Float[np.ndarray, " d_sae"]]:
    """(|mean on the concept - mean off it| / standard deviation, standard deviation) of every latent's value.

    0 for latents that are never active.
    """
    n = codes.n_rows
    positives = labels.sum(axis=0, dtype=np.float64)
    sums = codes.times(labels).astype(np.float64)
    ones = np.ones((n, 1), dtype=np.float32)
    total = codes.times(ones).astype(np.float64)
    squares = codes.times(ones, codes.values**2).astype(np.float64)[:, 0]
    deviation = np.sqrt(np.maximum(squares / n - (total[:, 0] / n) ** 2, 0.0))
    difference = sums / np.maximum(positives, 1) - (total - sums) / np.maximum(n - positives, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        scores = np.where(deviation[:, None] > 0, np.abs(difference) / deviation[:, None], 0.0)
    return scores, deviation


def probe(
    fit: Float[np.ndarray, "n d"],
    fit_label: Bool[np.ndarray, " n"],
    test: Float[np.ndarray, "m d"],
    test_label: Bool[np.ndarray, " m"],
) -> float:
    """AUROC on `test` of a logistic regression (L2, C = 1, both classes of equal weight, inputs standardised)."""
    from sklearn.linear_model import LogisticRegression

    mean, deviation = fit.mean(axis=0), fit.std(axis=0)
    deviation[deviation == 0] = 1.0
    model = LogisticRegression(solver="newton-cholesky", class_weight="balanced", max_iter=100)
    model.fit((fit - mean) / deviation, fit_label)
    return auroc(((test - mean) / deviation) @ model.coef_[0], test_label)


def sparse_probes(
    select: Codes,
    report: Codes,
    scores: Float[np.ndarray, "d_sae concepts"],
    samples: Sequence[Sample],
    ks: Sequence[int] = KS,
    on_concept: Callable[[], object] = lambda: None,
) -> Float[np.ndarray, "concepts n_ks"]:
    """AUROC of probes on the k latents of highest `scores`, for each concept and k."""
    found = np.full((len(samples), len(ks)), 0.5)  # where no latent tells anything
    with one_thread():
        for concept, sample in enumerate(samples):
            order = np.argsort(-scores[:, concept], kind="stable")[: max(ks)]
            order = order[scores[order, concept] > 0]
            chosen = order.tolist()
            fit, test = select.table(chosen, sample.fit), report.table(chosen, sample.test)
            for place, k in enumerate(ks if len(order) else ()):
                found[concept, place] = probe(fit[:, :k], sample.fit_label, test[:, :k], sample.test_label)
            on_concept()
    return found


def one_thread() -> AbstractContextManager:
    """Linear algebra on one thread: for a thousand regressions this small, more only wait for one another."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1)
