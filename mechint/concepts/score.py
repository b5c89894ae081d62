"""Everything that is asked of one dictionary, and the same of its baselines, on the same labelled rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.concepts import probes, scores, structure
from mechint.concepts.codes import Codes, Encode, Moments, encode_rows, moments, pca_dictionary, random_dictionary
from mechint.concepts.labels import Labelled
from mechint.errors import MechintError

# Concepts on more than this share of all tokens are left out: saying yes to everything finds them.
MOST_SHARE = 0.5
# Draws of the texts, with repeats, for the intervals.
N_BOOTSTRAP = 500
BATCH = 8192


@dataclass(frozen=True)
class Task:
    """Labelled rows in two halves by text: one to choose latents and thresholds on, one to report on.

    Attributes:
        columns: the concepts that are scored, as columns of `labelled.labels`.
        skipped: the others, and why.
        directions: unit differences of the mean row with and without each concept (rows to choose on).
    """

    labelled: Labelled
    columns: Int[np.ndarray, " concepts"]
    skipped: dict[str, str]
    select: Bool[np.ndarray, " n"]
    report: Bool[np.ndarray, " n"]
    select_labels: Bool[np.ndarray, "n_select concepts"]
    report_labels: Bool[np.ndarray, "n_report concepts"]
    moments: Moments
    directions: Float[np.ndarray, "concepts d_in"]
    samples: tuple[probes.Sample, ...]
    seed: int

    @property
    def concepts(self) -> list[str]:
        names = self.labelled.concepts
        return [names[column] for column in self.columns]

    def pairs(self) -> dict[int, int]:
        """(child: parent) among the scored concepts, by place."""
        place = {name: index for index, name in enumerate(self.concepts)}
        parents = {child: self.labelled.parents[name] for name, child in place.items()}
        return {child: place[parent] for child, parent in parents.items() if parent is not None and parent in place}


def make_task(labelled: Labelled, *, seed: int = 0, min_tokens: int = 20) -> Task:
    """Split the texts, drop what cannot be scored, and take what does not depend on a dictionary.

    Raises:
        MechintError: one text only, or no concept with `min_tokens` tokens in both halves.
    """
    select, report = labelled.halves(seed)
    of_select, of_report = labelled.labels[select], labelled.labels[report]
    counts, counts_report = of_select.sum(axis=0), of_report.sum(axis=0)
    skipped, columns = {}, []
    for column, name in enumerate(labelled.concepts):
        fewer = min(int(counts[column]), int(counts_report[column]))
        share = labelled.labels[:, column].mean()
        if fewer < min_tokens:
            skipped[name] = f"{fewer} tokens in one half of the texts, fewer than {min_tokens}"
        elif share > MOST_SHARE:
            skipped[name] = f"on {share:.0%} of all tokens"
        else:
            columns.append(column)
    if not columns:
        first = ", ".join(f"{name} ({why})" for name, why in list(skipped.items())[:3])
        raise MechintError(
            f"no concept of {labelled.source} can be scored: {first}; label more texts, or lower --min-tokens"
        )
    columns = np.array(columns)
    of_select, of_report = of_select[:, columns], of_report[:, columns]
    found, directions = _moments_and_directions(labelled, select, of_select)
    samples = [
        probes.sample_rows(of_select[:, place], of_report[:, place], seed * 100_003 + place)
        for place in range(len(columns))
    ]
    return Task(
        labelled, columns, skipped, select, report, of_select, of_report, found, directions, tuple(samples), seed
    )


def _moments_and_directions(
    labelled: Labelled, select: np.ndarray, labels: np.ndarray
) -> tuple[Moments, Float[np.ndarray, "concepts d_in"]]:
    sums: Any = 0.0
    start = 0

    def batches() -> Any:
        nonlocal sums, start
        for x in labelled.batches(select, BATCH):
            sums = sums + labels[start : start + len(x)].astype(np.float32).T @ x.numpy()
            start += len(x)
            yield x

    found = moments(batches())
    n, positives = len(labels), labels.sum(axis=0)[:, None].astype(np.float64)
    total = found.mean.numpy() * n
    directions = sums / positives - (total - sums) / np.maximum(n - positives, 1)
    return found, directions / np.maximum(np.linalg.norm(directions, axis=1, keepdims=True), 1e-30)


@dataclass(frozen=True)
class LatentConcepts:
    """The concept that each latent tells best, by F1 where it was chosen; -1 where it was never active there."""

    concept: Int[np.ndarray, " d_sae"]
    threshold: Float[np.ndarray, " d_sae"]
    f1: Float[np.ndarray, " d_sae"]
    precision: Float[np.ndarray, " d_sae"]
    recall: Float[np.ndarray, " d_sae"]
    mass_share: Float[np.ndarray, " d_sae"]
    top_share: Float[np.ndarray, " d_sae"]
    n_active: Int[np.ndarray, " d_sae"]
    # of the best latent of each concept: shares in that concept
    best_mass: Float[np.ndarray, " concepts"]
    best_top: Float[np.ndarray, " concepts"]


@dataclass(frozen=True)
class DictionaryScores:
    """What one dictionary's latents tell of each concept; arrays are in the order of `task.concepts`.

    `best`, `detectors` and every threshold were chosen on one half of the texts; the rest was measured on the other.
    """

    l0: float
    d_sae: int
    n_live: int
    best: scores.Best
    scores: scores.Scores
    f1_interval: Float[np.ndarray, "2 concepts"]
    coverage: float
    coverage_interval: tuple[float, float]
    auroc: Float[np.ndarray, " concepts"]  # of the best latent
    best_auroc_latent: Int[np.ndarray, " concepts"]
    best_auroc: Float[np.ndarray, " concepts"]
    n_split: Int[np.ndarray, " concepts"]
    split_f1: Float[np.ndarray, " concepts"]
    detectors: tuple[structure.Detector, ...]
    absorption: tuple[structure.Absorption, ...]
    latents: LatentConcepts
    probe_ks: tuple[int, ...]
    probes: Float[np.ndarray, "concepts n_ks"]


def score_dictionary(
    task: Task,
    encode: Encode,
    *,
    W_dec: Float[Tensor, "d_sae d_in"] | None = None,
    ks: tuple[int, ...] = probes.KS,
    on_stage: Callable[[str], object] = lambda stage: None,
) -> DictionaryScores:
    """Score the latents of a dictionary against every concept of the task.

    Args:
        encode: `[batch, d_in]` to non-negative `[batch, d_sae]`.
        W_dec: decoder rows; without them absorption is not measured.
        ks: sizes of the sparse probes; none for ().
        on_stage: called with the name of what begins.

    Raises:
        MechintError: too many active entries to keep.
    """
    on_stage("encode")
    select, report = (
        encode_rows(encode, task.labelled.batches(rows, BATCH), n_rows=int(rows.sum()), what="tokens")
        for rows in (task.select, task.report)
    )
    on_stage("score")
    labels, labels_report = task.select_labels.astype(np.float32), task.report_labels.astype(np.float32)
    thresholds = scores.choose_thresholds(select)
    counts = scores.count(select, labels, thresholds)
    counts_report = scores.count(report, labels_report, thresholds)
    best = scores.choose_best(select, task.select_labels, counts)
    found = scores.score(report, task.report_labels, best)
    interval, coverage_interval = _bootstrap(task, report, best)
    by_auroc = scores.coarse_auroc(counts).argmax(axis=0)
    on_stage("split")
    detectors = structure.split_all(select, task.select_labels, best, counts)
    split_f1 = [structure.f1_of(each.on(report), task.report_labels[:, c]) for c, each in enumerate(detectors)]
    absorbed: list[structure.Absorption] = []
    if W_dec is not None:
        rows = W_dec.detach().cpu().double().numpy()
        cosines = task.directions @ (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)).T
        absorbed = structure.absorption(
            (select, task.select_labels),
            (report, task.report_labels),
            detectors,
            task.pairs(),
            cosines,
            min_cosine(rows.shape[1]),
        )
    on_stage("probe")
    probed = np.zeros((len(task.columns), 0))
    if ks:
        separations, _ = probes.separations(select, labels)
        probed = probes.sparse_probes(select, report, separations, task.samples, ks)
    return DictionaryScores(
        l0=(len(select.rows) + len(report.rows)) / (select.n_rows + report.n_rows),
        d_sae=select.d_sae,
        n_live=int((select.counts() + report.counts() > 0).sum()),
        best=best,
        scores=found,
        f1_interval=interval,
        coverage=float(found.f1.mean()),
        coverage_interval=coverage_interval,
        auroc=_aurocs(task, report, best.latent),
        best_auroc_latent=by_auroc,
        best_auroc=_aurocs(task, report, by_auroc),
        n_split=np.array([len(each.latents) for each in detectors]),
        split_f1=np.array(split_f1),
        detectors=tuple(detectors),
        absorption=tuple(absorbed),
        latents=_latent_concepts(select, report, labels_report, thresholds, counts, counts_report, best),
        probe_ks=tuple(ks),
        probes=probed,
    )


def _aurocs(task: Task, report: Codes, latents: np.ndarray) -> Float[np.ndarray, " concepts"]:
    labels = task.report_labels.T
    return np.array([scores.latent_auroc(report, int(j), label) for j, label in zip(latents, labels, strict=True)])


def min_cosine(d_in: int) -> float:
    """Two standard deviations of the cosine between random directions: 2 / sqrt(d_in)."""
    return 2 / d_in**0.5


def _latent_concepts(
    select: Codes,
    report: Codes,
    labels_report: np.ndarray,
    thresholds: scores.Thresholds,
    counts: scores.Counts,
    counts_report: scores.Counts,
    best: scores.Best,
) -> LatentConcepts:
    f1 = counts.f1()
    n_thresholds, n_concepts = f1.shape[1:]
    flat = f1.reshape(len(f1), -1).argmax(axis=1)
    at, concept = flat // n_concepts, flat % n_concepts
    rows = np.arange(len(f1))
    hits, on = counts_report.hits[rows, at, concept], counts_report.on[rows, at]
    positives = counts_report.positives[concept]
    place = scores.place_of_activation(report, labels_report)
    live = select.counts() > 0
    return LatentConcepts(
        concept=np.where(live, concept, -1),
        threshold=thresholds.values[rows, at].astype(np.float64),
        f1=np.where(live, 2 * hits / np.maximum(on + positives, 1), np.nan),
        precision=np.where(live, hits / np.maximum(on, 1), np.nan),
        recall=np.where(live, hits / np.maximum(positives, 1), np.nan),
        mass_share=np.where(live, place.mass[rows, concept], np.nan),
        top_share=np.where(live, place.top[rows, concept], np.nan),
        n_active=select.counts() + report.counts(),
        best_mass=place.mass[best.latent, np.arange(n_concepts)],
        best_top=place.top[best.latent, np.arange(n_concepts)],
    )


def _bootstrap(task: Task, report: Codes, best: scores.Best) -> tuple[np.ndarray, tuple[float, float]]:
    """95 % intervals of each F1 and of their mean: texts of the report half drawn again with repeats."""
    _, text = np.unique(task.labelled.text_ids[task.report], return_inverse=True)
    n_texts = int(text.max()) + 1
    sums = np.zeros((2, n_texts, len(task.columns)))  # hits; on + positives
    for c, (latent, threshold) in enumerate(best.pairs()):
        on = scores.rows_on(report, latent, threshold)
        label = task.report_labels[:, c]
        sums[0, :, c] = np.bincount(text[on], weights=label[on], minlength=n_texts)
        sums[1, :, c] = np.bincount(text[on], minlength=n_texts) + np.bincount(text, weights=label, minlength=n_texts)
    drawn = np.random.default_rng(task.seed).multinomial(n_texts, [1 / n_texts] * n_texts, size=N_BOOTSTRAP)
    f1 = 2 * (drawn @ sums[0]) / np.maximum(drawn @ sums[1], 1)
    low, high = np.percentile(f1.mean(axis=1), [2.5, 97.5])
    return np.percentile(f1, [2.5, 97.5], axis=0), (float(low), float(high))


def dense_probes(task: Task) -> Float[np.ndarray, " concepts"]:
    """AUROC of a probe on all of the activation itself, for each concept: what there is to be found."""
    select, report = task.labelled.indices[task.select], task.labelled.indices[task.report]
    found = []
    with probes.one_thread():
        for sample in task.samples:
            fit, test = (_vectors(task.labelled, rows) for rows in (select[sample.fit], report[sample.test]))
            found.append(probes.probe(fit, sample.fit_label, test, sample.test_label))
    return np.array(found)


def _vectors(labelled: Labelled, indices: np.ndarray) -> Float[np.ndarray, "n d_in"]:
    wanted = torch.from_numpy(indices)
    rows = labelled.rows[wanted].float() if isinstance(labelled.rows, Tensor) else labelled.rows.rows(wanted)
    return rows.numpy()


def token_f1(task: Task) -> Float[np.ndarray, " concepts"]:
    """F1 of a list of token ids: what the token alone tells, without its context.

    The ids of the list were chosen on one half, in falling order of how often the concept goes with them, as many as
    make F1 largest there; measured on the other half.
    """
    tokens = task.labelled.tokens
    ids, of_row = np.unique(tokens, return_inverse=True)
    of_select, of_report = of_row[task.select], of_row[task.report]
    seen = np.bincount(of_select, minlength=len(ids))
    found = []
    for c in range(len(task.columns)):
        label = task.select_labels[:, c]
        hits = np.bincount(of_select, weights=label, minlength=len(ids))
        order = np.argsort(-hits / np.maximum(seen, 1), kind="stable")
        f1 = 2 * hits[order].cumsum() / (seen[order].cumsum() + label.sum())
        listed = np.zeros(len(ids), dtype=bool)
        listed[order[: int(f1.argmax()) + 1]] = True
        found.append(structure.f1_of(listed[of_report], task.report_labels[:, c]))
    return np.array(found)


def baselines(task: Task, d_sae: int, l0: float, *, ks: tuple[int, ...] = (1, 5)) -> dict[str, DictionaryScores]:
    """The scores of "random" (an untrained dictionary of this size and sparsity) and "pca" (principal directions)."""
    random = random_dictionary(task.moments.mean, d_sae, l0, task.seed)
    return {
        "random": score_dictionary(task, random, ks=ks),
        "pca": score_dictionary(task, pca_dictionary(task.moments), ks=ks),
    }
