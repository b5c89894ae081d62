"""`evaluate_texts`: every metric of docs/metrics.md from texts alone, in one pass."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.eval.bootstrap import reconstruction_intervals
from mechint.eval.histograms import activity_metrics, l0_histogram
from mechint.eval.language import language_intervals, language_totals
from mechint.eval.one_pass import LanguageSums, run_texts, text_groups
from mechint.eval.sums import COLUMNS, ReconstructionSums, reconstruction_metrics
from mechint.eval.texts import Text, texts_from_tokens
from mechint.inside import Inside, special_tokens


def evaluate_texts(
    inside: Inside,
    texts: Sequence[str] | Sequence[Text],
    *,
    mean: Float[Tensor, " d_out"] | None = None,
    norm_limit: float | None = None,
    batch_size: int = 16,
    n_resamples: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Any]:
    """All metrics from texts, in one pass over model and SAE. What a transcoder computes is compared with what stands
    at the hook that it replaces.

    Args:
        texts: strings, tokenised as the SAE's activations were made, or texts as `mechint.eval.language.Text`.
        mean: the mean activation of the training rows, at the hook that is replaced. Mean ablation puts it in, and
            `explained_variance_legacy` is about it; both are left out without it.
        norm_limit: if given, `ce_without_outliers` holds the cross-entropies with activations of a larger norm left as
            the model has them.
        n_resamples: resamples of texts for the 95 % intervals; 0 leaves them out.

    Returns:
        Flat keys over the rows that the SAE was trained on (the BOS row not among them if it was left out) and over all
        predictions; `with_special` and `without_special` over all rows and predictions, and over those whose token is
        not special; `ci95`, `ci95_with_special`, `ci95_without_special`; `l0_histogram`; and `dead_features` and its
        like, whose window is these texts (`n_val` rows).

    Raises:
        MechintError: no texts, or none with two tokens.
    """
    if not texts:
        raise MechintError("no texts: give at least one")
    if all(isinstance(text, str) for text in texts):
        keep_bos = inside.first_seen() == 0
        read = texts_from_tokens(
            inside.tokenize([str(text) for text in texts]), prepend_bos=inside.prepend_bos, keep_bos=keep_bos
        )
    else:
        read = [text for text in texts if isinstance(text, Text) and len(text.tokens) > 1]
        if not read:
            raise MechintError("no evaluation text has two tokens, so there is nothing to predict: give longer texts")
    sae = inside.sae
    _, n_groups = text_groups(len(read))
    rows = ReconstructionSums(sae.d_out, sae.d_sae, n_groups=4 * n_groups, centre=mean)
    sums = run_texts(
        [sae],
        inside.model,
        read,
        inside.hook_name,
        mean=mean,
        rows=rows,
        special=special_tokens(inside.model.tokenizer),
        norm_limit=norm_limit,
        batch_size=batch_size,
        progress=progress,
    )
    found = {**summary_of(rows, KINDS["as_trained"]), **language_totals(sums), "n_texts_ce": len(read)}
    found |= activity_metrics(rows.fire_counts, found["n_val"])
    found |= {"l0_histogram": l0_histogram(rows.l0_counts)}
    if norm_limit is not None:
        found["ce_without_outliers"] = language_totals(sums, 1)
    return found | by_special_tokens(rows, sums, n_resamples=n_resamples, seed=seed, as_trained=True)


# Which of a text's four groups of rows (2 * not seen by the SAE + special token) a summary is over.
KINDS = {"as_trained": [0, 1], "with_special": [0, 1, 2, 3], "without_special": [0, 2]}


def by_special_tokens(
    rows: ReconstructionSums, sums: LanguageSums, *, n_resamples: int, seed: int, as_trained: bool = False
) -> dict[str, Any]:
    """`with_special` and `without_special`, and the intervals of each; `ci95` of the flat keys too if asked."""
    found: dict[str, Any] = {}
    for name in ("with_special", "without_special"):
        special = name == "with_special"
        found[name] = {**summary_of(rows, KINDS[name]), **language_totals(sums, special=special)}
        found[f"ci95_{name}"] = intervals_of(
            rows, KINDS[name], n_resamples=n_resamples, seed=seed
        ) | language_intervals(sums, special=special, n_resamples=n_resamples, seed=seed)
    if as_trained:
        found["ci95"] = intervals_of(
            rows, KINDS["as_trained"], n_resamples=n_resamples, seed=seed
        ) | language_intervals(sums, n_resamples=n_resamples, seed=seed)
    return found


def summary_of(rows: ReconstructionSums, kinds: list[int]) -> dict[str, Any]:
    """The reconstruction metrics over some of the four kinds of rows."""
    table, deviation = _chosen(rows, kinds)
    totals = table.sum(dim=0)
    n_rows = int(totals[0])
    if n_rows == 0:
        return {"n_val": 0}
    named: dict[str, float] = dict(zip(COLUMNS, totals.tolist(), strict=True))
    found = reconstruction_metrics(named, float(deviation.sum(dim=0).square().sum()), rows.d_in)
    return {"val_mse": found["mse_per_dim"], "val_l0": found["l0"] / rows.d_sae, **found, "n_val": n_rows}


def intervals_of(rows: ReconstructionSums, kinds: list[int], *, n_resamples: int, seed: int) -> dict[str, list[float]]:
    return reconstruction_intervals(*_chosen(rows, kinds), n_resamples=n_resamples, seed=seed)


def _chosen(rows: ReconstructionSums, kinds: list[int]) -> tuple[Tensor, Tensor]:
    """The sums of each text over rows of these kinds."""
    table = rows.table.view(-1, 4, rows.table.shape[1])[:, kinds].sum(dim=1)
    return table, rows.deviation.view(-1, 4, rows.d_in)[:, kinds].sum(dim=1)
