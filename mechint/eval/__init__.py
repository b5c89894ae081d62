"""Evaluating SAEs: on stored activations, and spliced into the language model. docs/metrics.md defines every number."""

from mechint.eval.checkpoint import evaluate_checkpoint
from mechint.eval.from_texts import evaluate_texts
from mechint.eval.histograms import density_histogram, l0_histogram
from mechint.eval.language import language_metrics, language_metrics_of
from mechint.eval.reconstruction import (
    Activity,
    collect_feature_activity,
    evaluate_rows,
    evaluate_sae,
    measure_activity,
    measure_rows,
)
from mechint.eval.rows import METRICS_COLUMNS, append_metrics_row, read_metrics_csv
from mechint.eval.summary import print_eval_summary, save_eval_summary
from mechint.eval.sums import ReconstructionSums
from mechint.eval.texts import Text, texts_from_rows, texts_from_tokens

__all__ = [
    "METRICS_COLUMNS",
    "Activity",
    "ReconstructionSums",
    "Text",
    "append_metrics_row",
    "collect_feature_activity",
    "density_histogram",
    "evaluate_checkpoint",
    "evaluate_rows",
    "evaluate_sae",
    "evaluate_texts",
    "l0_histogram",
    "language_metrics",
    "language_metrics_of",
    "measure_activity",
    "measure_rows",
    "print_eval_summary",
    "read_metrics_csv",
    "save_eval_summary",
    "texts_from_rows",
    "texts_from_tokens",
]
