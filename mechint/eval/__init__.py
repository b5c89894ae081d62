"""Evaluating SAEs: on stored activations, and spliced into the language model. docs/metrics.md defines every number."""

from mechint.eval.checkpoint import evaluate_checkpoint
from mechint.eval.language import Text, language_metrics, language_metrics_of, texts_from_rows, texts_from_tokens
from mechint.eval.reconstruction import Activity, collect_feature_activity, evaluate_sae, measure_activity
from mechint.eval.rows import METRICS_COLUMNS, append_metrics_row, read_metrics_csv
from mechint.eval.summary import print_eval_summary, save_eval_summary
from mechint.eval.sums import ReconstructionSums

__all__ = [
    "METRICS_COLUMNS",
    "Activity",
    "ReconstructionSums",
    "Text",
    "append_metrics_row",
    "collect_feature_activity",
    "evaluate_checkpoint",
    "evaluate_sae",
    "language_metrics",
    "language_metrics_of",
    "measure_activity",
    "print_eval_summary",
    "read_metrics_csv",
    "save_eval_summary",
    "texts_from_rows",
    "texts_from_tokens",
]
