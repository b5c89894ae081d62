"""The result of an evaluation, as it is printed and saved."""

import os
from collections.abc import Mapping
from typing import Any

from mechint.provenance import write_json

# Order of the printed block: the original's keys, then the newer ones. Keys that are not listed come last.
PRINTED = (
    "val_mse",
    "val_l0",
    "dead_features",
    "dead_fraction",
    "training_seconds",
    "total_seconds",
    "num_features",
    "num_params",
    "git_commit",
    "run_dir",
    "checkpoint_path",
    "l0",
    "l1",
    "mse_per_dim",
    "mse_per_token",
    "fvu",
    "explained_variance",
    "explained_variance_legacy",
    "cosine",
    "l2_ratio",
    "relative_reconstruction_bias",
    "n_train",
    "n_val",
    "n_dead_val",
    "n_dense_val",
    "alive_features",
    "dense_features",
    "dense_fraction",
    "features_over_1_percent",
    "ce_clean",
    "ce_sae",
    "ce_zero",
    "ce_mean",
    "ce_recovered_zero",
    "ce_recovered_mean",
    "kl_clean_sae",
    "kl_clean_zero",
    "kl_clean_mean",
    "kl_score_zero",
    "kl_score_mean",
    "n_texts_ce",
    "n_predicted",
)


def print_eval_summary(summary: Mapping[str, Any]) -> None:
    """Print an empty line, `---` and one `key: value` a line; floats to six digits (the JSON holds them in full).

    Nested values (intervals, histograms, values with and without special tokens) are in the JSON alone.
    """
    print()
    print("---")
    for key in [*(key for key in PRINTED if key in summary), *(key for key in summary if key not in PRINTED)]:
        value = summary[key]
        if key == "notes" or isinstance(value, dict):
            continue
        if value is None:
            value = "undefined"
        elif isinstance(value, float):
            value = f"{value:.6g}"
        print(f"{key}: {value}")


def save_eval_summary(summary: Mapping[str, Any], output_path: str | os.PathLike, *, overwrite: bool = True) -> None:
    """Write the summary as JSON (indent 2, sorted keys), atomically. `overwrite=False` refuses an existing file."""
    write_json(output_path, dict(summary), overwrite=overwrite)
