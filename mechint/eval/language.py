"""What an SAE costs the language model: its reconstruction is put in place of the activation, and predictions compared.

Four sets of predictions of the same texts: clean, with the SAE, with zero and with the mean activation at the hook. The
three edits touch exactly the positions that the SAE was trained on: where the BOS row was left out of the store,
position 0 keeps its own value in all of them. docs/metrics.md states the formulas; `mechint.eval.one_pass` does it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from mechint.eval.bootstrap import resample
from mechint.eval.one_pass import BASELINES, LanguageSums, Predictor, run_texts
from mechint.eval.sums import Number, plain
from mechint.eval.texts import Text, texts_from_rows, texts_from_tokens
from mechint.sae import SAE

__all__ = ["Predictor", "Text", "language_metrics", "language_metrics_of", "texts_from_rows", "texts_from_tokens"]


def language_metrics(
    sae: SAE,
    model: Predictor,
    texts: Sequence[Text],
    mean: Float[Tensor, " d_out"],
    hook_name: str,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Cross-entropy clean and under three replacements at `hook_name`, and KL(clean || replaced) of each.

    Args:
        model: runs in the processing that the SAE was trained in; the SAE is on its device.
        mean: the activation that mean ablation puts in, usually the mean over the training rows.

    Returns:
        ce_clean, ce_sae, ce_zero, ce_mean, kl_clean_sae, kl_clean_zero and kl_clean_mean in nats per predicted token;
        ce_recovered_* and kl_score_* for zero and mean (None where the ablation costs nothing); n_texts_ce and
        n_predicted.
    """
    return language_metrics_of([sae], model, texts, mean, hook_name, batch_size=batch_size, progress=progress)[0]


def language_metrics_of(
    saes: Sequence[SAE],
    model: Predictor,
    texts: Sequence[Text],
    mean: Float[Tensor, " d_out"],
    hook_name: str,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """`language_metrics` of several SAEs of one hook; what does not depend on the SAE is run once for all of them."""
    sums = run_texts(saes, model, texts, hook_name, mean=mean, batch_size=batch_size, progress=progress)
    return [language_totals(sums, index) | {"n_texts_ce": len(texts)} for index in range(len(saes))]


def language_totals(sums: LanguageSums, sae: int = 0, *, special: bool = True) -> dict[str, Any]:
    """The metrics of one SAE over all texts, with or without predictions made at special tokens."""
    totals = dict(zip(sums.names(sae), sums.of(sae, special=special).sum(dim=0).tolist(), strict=True))
    n_predicted = int(totals["n"])
    if n_predicted == 0:
        return {"n_predicted": 0}
    return {**language_ratios(totals), "n_predicted": n_predicted}


def language_intervals(
    sums: LanguageSums, sae: int = 0, *, special: bool = True, n_resamples: int = 1000, seed: int = 0
) -> dict[str, list[float]]:
    """95 % bootstrap intervals over texts of the metrics of one SAE."""
    table, names = sums.of(sae, special=special).numpy(), sums.names(sae)

    def statistic(weights: np.ndarray) -> dict[str, np.ndarray]:
        return language_ratios(dict(zip(names, (weights @ table).T, strict=True)))

    return resample(len(table), statistic, n_resamples=n_resamples, seed=seed)


def language_ratios(totals: Mapping[str, Number]) -> dict[str, Any]:
    """The metrics from sums over predictions: numbers, or arrays (one a resample). Undefined is None, in arrays nan."""
    with np.errstate(divide="ignore", invalid="ignore"):
        t = {name: np.asarray(value, dtype=np.float64) for name, value in totals.items()}
        ce = {name: t[f"nll_{name}"] / t["n"] for name in ("clean", "sae", *BASELINES) if f"nll_{name}" in t}
        kl = {name: t[f"kl_{name}"] / t["n"] for name in ("sae", *BASELINES) if f"kl_{name}" in t}
        found = {f"ce_{name}": value for name, value in ce.items()}
        for name in BASELINES:
            if name in ce:
                # 1: the SAE costs nothing; 0: as much as the ablation. Undefined where the ablation costs nothing.
                lost = ce[name] - ce["clean"]
                found[f"ce_recovered_{name}"] = (ce[name] - ce["sae"]) / np.where(lost > 0, lost, np.nan)
        found |= {f"kl_clean_{name}": value for name, value in kl.items()}
        for name in BASELINES:
            if name in kl:
                found[f"kl_score_{name}"] = (kl[name] - kl["sae"]) / np.where(kl[name] > 0, kl[name], np.nan)
    return plain(found)
