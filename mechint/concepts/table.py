"""Rows, summary and printed table of concept scores."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechint.concepts.score import DictionaryScores, Task, min_cosine
from mechint.concepts.structure import MIN_GAIN, MIN_PARENT_F1

# Significant digits of the CSV files.
N_DIGITS = 6
# Concepts printed from each end of the table.
N_PRINTED = 15


def concept_rows(
    task: Task,
    found: DictionaryScores,
    others: Mapping[str, DictionaryScores],
    dense: np.ndarray | None,
    token: np.ndarray,
) -> list[dict[str, Any]]:
    """A row for each scored concept, best F1 first. Cells that were not measured are None."""
    absorbed = {each.child: each for each in found.absorption}
    tokens = task.labelled.labels[:, task.columns].sum(axis=0)
    share = task.report_labels.mean(axis=0)
    rows = []
    for c, name in enumerate(task.concepts):
        absorption = absorbed.get(c)
        row: dict[str, Any] = {
            "concept": name,
            "parent": task.labelled.parents[name],
            "n_tokens": int(tokens[c]),
            "n_spans": task.labelled.n_spans[task.columns[c]],
            "best_latent": int(found.best.latent[c]),
            "f1": found.scores.f1[c],
            "f1_low": found.f1_interval[0, c],
            "f1_high": found.f1_interval[1, c],
            "precision": found.scores.precision[c],
            "recall": found.scores.recall[c],
            "threshold": found.best.threshold[c],
            "auroc": found.auroc[c],
            "best_auroc_latent": int(found.best_auroc_latent[c]),
            "best_auroc": found.best_auroc[c],
            "mass_share": found.latents.best_mass[c],
            "top_share": found.latents.best_top[c],
            "n_latents_for_concept": int(found.n_split[c]),
            "split_f1": found.split_f1[c],
            "split_latents": " ".join(map(str, found.detectors[c].latents)),
            "absorption": absorption.rate if absorption else None,
            "parent_silent": absorption.silent if absorption else None,
            "parent_silent_elsewhere": absorption.silent_elsewhere if absorption else None,
            "absorbing_latents": " ".join(map(str, absorption.latents)) if absorption else None,
        }
        for place, k in enumerate(found.probe_ks):
            row[f"probe_auroc_{k}"] = found.probes[c, place]
        row["probe_auroc_dense"] = None if dense is None else dense[c]
        for which in ("random", "pca"):
            other = others.get(which)
            row[f"{which}_f1"] = None if other is None else other.scores.f1[c]
            row[f"{which}_auroc"] = None if other is None else other.best_auroc[c]
            for place, k in enumerate(other.probe_ks if other else ()):
                row[f"{which}_probe_auroc_{k}"] = other.probes[c, place] if other else None
        row["token_f1"] = token[c]
        row["always_f1"] = 2 * share[c] / (1 + share[c])
        rows.append({key: _cell(value) for key, value in row.items()})
    return sorted(rows, key=lambda row: -row["f1"])


def latent_rows(task: Task, found: DictionaryScores) -> list[dict[str, Any]]:
    """A row for each latent with the concept that it tells best; None throughout where it was never active."""
    names, each = task.concepts, found.latents
    return [
        {
            "feature_idx": latent,
            "concept": names[each.concept[latent]] if each.concept[latent] >= 0 else None,
            "f1": _cell(each.f1[latent]),
            "precision": _cell(each.precision[latent]),
            "recall": _cell(each.recall[latent]),
            "threshold": _cell(each.threshold[latent]),
            "mass_share": _cell(each.mass_share[latent]),
            "top_share": _cell(each.top_share[latent]),
            "n_active": int(each.n_active[latent]),
        }
        for latent in range(found.d_sae)
    ]


def summary(
    task: Task,
    found: DictionaryScores,
    others: Mapping[str, DictionaryScores],
    dense: np.ndarray | None,
    token: np.ndarray,
) -> dict[str, Any]:
    """The numbers of concepts.json that stand for all concepts together."""
    means = dictionary_summary(found)
    result: dict[str, Any] = {
        "labels": task.labelled.source,
        "n_concepts": len(task.columns),
        "n_tokens": len(task.labelled.indices),
        "n_texts": len(np.unique(task.labelled.text_ids)),
        "skipped": task.skipped,
        **means,
        "token_coverage": float(token.mean()),
        "baselines": {name: dictionary_summary(other) for name, other in others.items()},
        "probe_auroc_dense": None if dense is None else float(np.nanmean(dense)),
        "absorption_pairs": [
            {
                "child": task.concepts[each.child],
                "parent": task.concepts[each.parent],
                "absorption": each.rate,
                "parent_silent": each.silent,
                "parent_silent_elsewhere": _cell(each.silent_elsewhere),
                "n_tokens": each.n_tokens,
                "latents": list(each.latents),
            }
            for each in found.absorption
        ],
        "definitions": {
            "split_gain": MIN_GAIN,
            "absorption_min_parent_f1": MIN_PARENT_F1,
            "absorption_min_cosine": min_cosine(task.directions.shape[1]),
        },
    }
    return result


def dictionary_summary(found: DictionaryScores) -> dict[str, Any]:
    """Means over concepts, and over latents, of one dictionary."""
    latents = found.latents
    live = latents.concept >= 0
    rates = [each.rate for each in found.absorption]
    return {
        "d_sae": found.d_sae,
        "l0": found.l0,
        "n_live": found.n_live,
        "coverage": found.coverage,
        "ci95": {"coverage": list(found.coverage_interval)},
        "auroc": float(np.nanmean(found.auroc)),
        "best_auroc": float(np.nanmean(found.best_auroc)),
        "n_found": int((found.scores.f1 >= 0.5).sum()),
        "monosemanticity": {
            "mass_share": _mean(latents.mass_share[live]),
            "top_share": _mean(latents.top_share[live]),
            "n_latents_f1_half": int((latents.f1[live] >= 0.5).sum()),
        },
        "n_latents_for_concept": float(found.n_split.mean()),
        "split_coverage": float(found.split_f1.mean()),
        "absorption": _mean(np.array(rates)),
        "n_absorption_pairs": len(rates),
        "probe_auroc": {str(k): float(np.nanmean(found.probes[:, i])) for i, k in enumerate(found.probe_ks)},
    }


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def _cell(value: Any) -> Any:
    """A plain value: numbers to six digits, None for what is not a finite number."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    number = float(value)
    return float(f"{number:.{N_DIGITS}g}") if math.isfinite(number) else None


def write_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """CSV text with a header; None is an empty cell."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def text_table(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """What the command prints: the concepts told best and worst, and the means beside their baselines."""
    columns = {
        "concept": "concept", "n_tokens": "tokens", "best_latent": "latent", "f1": "F1", "precision": "prec.",
        "recall": "recall", "auroc": "AUROC", "n_latents_for_concept": "split", "absorption": "absorbed",
        "probe_auroc_5": "probe5", "probe_auroc_dense": "dense", "random_f1": "randF1", "pca_f1": "pcaF1",
        "token_f1": "tokF1",
    }  # fmt: skip
    columns = {key: title for key, title in columns.items() if any(row.get(key) is not None for row in rows)}
    shown = list(rows)
    if len(rows) > 2 * N_PRINTED:
        shown = [*rows[:N_PRINTED], {}, *rows[-N_PRINTED:]]
    width = max(len("concept"), *(len(row["concept"]) for row in rows))
    lines = [" ".join(f"{title:<{width}}" if key == "concept" else f"{title:>8}" for key, title in columns.items())]
    for row in shown:
        lines.append(" ".join(_printed(row, key, width) for key in columns) if row else "...")
    return "\n".join([*lines, "", *_summary_lines(summary)])


def _printed(row: Mapping[str, Any], key: str, width: int) -> str:
    value = row.get(key)
    if key == "concept":
        return f"{value:<{width}}"
    if value is None:
        return f"{'-':>8}"
    return f"{value:>8}" if isinstance(value, int) else f"{value:>8.3f}"


def _summary_lines(summary: Mapping[str, Any]) -> list[str]:
    low, high = summary["ci95"]["coverage"]
    baselines = [f"{name} {each['coverage']:.3f}" for name, each in summary["baselines"].items()]
    lines = [
        f"concepts: {summary['n_concepts']} scored on {summary['n_tokens']:,} tokens of {summary['n_texts']:,} texts,"
        f" {len(summary['skipped'])} left out",
        f"coverage: {summary['coverage']:.3f} [{low:.3f}, {high:.3f}] (mean best-latent F1; "
        + ", ".join([*baselines, f"token list {summary['token_coverage']:.3f}"])
        + ")",
    ]
    if summary["probe_auroc"]:
        probes = [f"k={k} {value:.3f}" for k, value in summary["probe_auroc"].items()]
        lines.append(f"probes: {', '.join(probes)}, all of the activation {summary['probe_auroc_dense']:.3f} (AUROC)")
    mono = summary["monosemanticity"]
    if mono["mass_share"] is not None:
        lines.append(
            f"monosemanticity: {mono['mass_share']:.3f} of a latent's activation lies in its concept,"
            f" {mono['top_share']:.3f} of its top rows"
        )
    split = f"splitting: {summary['n_latents_for_concept']:.2f} latents a concept"
    if summary["absorption"] is not None:
        split += f"; absorption: {summary['absorption']:.3f} of a child's tokens, {summary['n_absorption_pairs']} pairs"
    return [*lines, split]
