"""What an SAE costs the language model: its reconstruction is put in place of the activation, and predictions compared.

Four runs over the same texts: clean, with the SAE, with zero and with the mean activation at the hook. The three edits
touch exactly the positions that the SAE was trained on: where the BOS row was left out of the store, position 0 keeps
its own value in all of them. docs/metrics.md states the formulas.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.sae import SAE

# Largest [tokens, d_vocab] block of logits made at once: 256 MB in float32. Two or three exist at a time.
MAX_LOGIT_ELEMENTS = 2**26
# Positions whose log-probabilities are compared at once.
POSITIONS_PER_BLOCK = 512


@runtime_checkable
class Predictor(Protocol):
    """The part of `mechint.models.LanguageModel` that is needed here."""

    d_vocab: int
    name: str

    def logits(self, tokens: Tensor) -> Tensor: ...

    def logits_with(self, tokens: Tensor, hook_name: str, edit: Callable[[Tensor], Tensor]) -> Tensor: ...


class Text(NamedTuple):
    """One text as the model reads it."""

    tokens: list[int]
    seen: list[bool]  # positions whose activation the SAE was trained on; only those are replaced


def texts_from_rows(
    activations: Activations, indices: Int[Tensor, " rows"] | None = None, *, max_texts: int | None = None
) -> list[Text]:
    """The texts that the rows `indices` (all if None) are from, put together again from the stored tokens.

    Texts come in the order of their ids, the first `max_texts` of them. A BOS that was prepended for the model but left
    out of the store is prepended again. Where rows of a text are missing from the store, the text ends before the gap.

    Raises:
        MechintError: the activations were stored without tokens, or no text has two tokens.
    """
    tokens, text_ids, positions = activations.tokens, activations.text_ids, activations.positions
    if tokens is None or text_ids is None or positions is None:
        raise MechintError(
            f"{activations.path} was stored without its tokens: give texts with --eval-texts-path, or collect again"
        )
    wanted = torch.unique(text_ids if indices is None else text_ids[indices])
    rows = torch.isin(text_ids, wanted[:max_texts]).nonzero().flatten()
    bos = activations.info.get("bos_token_id") if activations.info.get("prepend_bos") else None
    groups: dict[int, list[tuple[int, int]]] = {}
    for text, position, token in zip(
        text_ids[rows].tolist(), positions[rows].tolist(), tokens[rows].tolist(), strict=True
    ):
        groups.setdefault(text, []).append((position, token))
    texts = [_rebuild(sorted(groups[text]), bos) for text in sorted(groups)]
    texts = [text for text in texts if len(text.tokens) > 1]
    if not texts:
        raise MechintError(f"no text of {activations.path} has two tokens, so there is nothing to predict")
    return texts


def _rebuild(row: list[tuple[int, int]], bos: int | None) -> Text:
    tokens: list[int] = []
    seen: list[bool] = []
    if row[0][0] == 1 and bos is not None:
        tokens, seen = [bos], [False]
    for position, token in row:
        if position != len(tokens):
            break
        tokens.append(token)
        seen.append(True)
    return Text(tokens, seen)


def texts_from_tokens(token_lists: Sequence[Sequence[int]], *, prepend_bos: bool, keep_bos: bool) -> list[Text]:
    """Tokenised texts, BOS included if prepended, with position 0 unseen if the SAE was trained without BOS rows.

    Raises:
        MechintError: no text has two tokens.
    """
    texts = []
    for tokens in token_lists:
        if len(tokens) > 1:
            texts.append(Text(list(tokens), [keep_bos or not prepend_bos] + [True] * (len(tokens) - 1)))
    if not texts:
        raise MechintError("no evaluation text has two tokens, so there is nothing to predict: give longer texts")
    return texts


def language_metrics(
    sae: SAE,
    model: Predictor,
    texts: Sequence[Text],
    mean: Float[Tensor, " d_in"],
    hook_name: str,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Cross-entropy clean and under three replacements at `hook_name`, and KL(clean || SAE).

    Args:
        model: runs in the processing that the SAE was trained in; the SAE is on its device.
        mean: the activation that mean ablation puts in, usually the mean over the training rows.

    Returns:
        ce_clean, ce_sae, ce_zero, ce_mean and kl_clean_sae in nats per predicted token; ce_recovered_zero and
        ce_recovered_mean (None where the ablation costs nothing); n_texts_ce, n_predicted.
    """
    return language_metrics_of([sae], model, texts, mean, hook_name, batch_size=batch_size, progress=progress)[0]


def language_metrics_of(
    saes: Sequence[SAE],
    model: Predictor,
    texts: Sequence[Text],
    mean: Float[Tensor, " d_in"],
    hook_name: str,
    *,
    batch_size: int = 16,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """`language_metrics` of several SAEs of one hook; what does not depend on the SAE is run once for all of them."""
    baselines: dict[str, Callable[[Tensor], Tensor]] = {
        "zero": torch.zeros_like,
        "mean": lambda x: mean.to(x).expand_as(x),
    }
    nll = dict.fromkeys(("clean", *baselines), 0.0)
    nll_sae, kl = [0.0] * len(saes), [0.0] * len(saes)
    n_predicted = 0
    with torch.inference_mode():
        for tokens, seen, lengths in _batches(texts, batch_size, model.d_vocab, progress):
            # Predictions are made at positions 0 .. length - 2, of the tokens one further on. Padding makes none.
            predicts = torch.arange(tokens.shape[1]) < (lengths - 1)[:, None]
            targets = tokens.roll(-1, dims=1)[predicts]
            clean = model.logits(tokens)[predicts]
            nll["clean"] += _nll_sum(clean, targets)
            n_predicted += len(targets)
            for index, sae in enumerate(saes):
                edited = model.logits_with(tokens, hook_name, _only_where(seen, partial(_reconstruct, sae)))[predicts]
                nll_sae[index] += _nll_sum(edited, targets)
                kl[index] += _kl_sum(clean, edited)
                del edited
            for name, edit in baselines.items():
                edited = model.logits_with(tokens, hook_name, _only_where(seen, edit))[predicts]
                nll[name] += _nll_sum(edited, targets)
                del edited
    ce = {f"ce_{name}": total / n_predicted for name, total in nll.items()}
    found = []
    for nll_one, kl_one in zip(nll_sae, kl, strict=True):
        ce_sae = nll_one / n_predicted
        found.append(
            {
                **ce,
                "ce_sae": ce_sae,
                "ce_recovered_zero": _recovered(ce["ce_clean"], ce_sae, ce["ce_zero"]),
                "ce_recovered_mean": _recovered(ce["ce_clean"], ce_sae, ce["ce_mean"]),
                "kl_clean_sae": kl_one / n_predicted,
                "n_texts_ce": len(texts),
                "n_predicted": n_predicted,
            }
        )
    return found


def _reconstruct(sae: SAE, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
    return sae(x.float())[0]


def _recovered(clean: float, sae: float, baseline: float) -> float | None:
    """1 if the SAE costs nothing, 0 if it costs what the ablation costs; None if the ablation costs nothing."""
    return (baseline - sae) / (baseline - clean) if baseline > clean else None


def _only_where(seen: Bool[Tensor, "batch pos"], edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def masked(value: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_in"]:
        return torch.where(seen.to(value.device)[..., None], edit(value).to(value.dtype), value)

    return masked


def _batches(
    texts: Sequence[Text], batch_size: int, d_vocab: int, progress: bool
) -> Iterator[tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"], Int[Tensor, " batch"]]]:
    """Texts of like length together, padded on the right, at most `batch_size` and at most a block of logits."""
    ordered = sorted(texts, key=lambda text: len(text.tokens))
    batches: list[list[Text]] = []
    for text in ordered:
        n_logits = (len(batches[-1]) + 1) * len(text.tokens) * d_vocab if batches else 0
        if not batches or len(batches[-1]) == batch_size or n_logits > MAX_LOGIT_ELEMENTS:
            batches.append([])
        batches[-1].append(text)
    if progress:
        from tqdm import tqdm

        batches = tqdm(batches, desc="cross-entropy", unit="batch", leave=False)  # type: ignore[assignment]
    for batch in batches:
        lengths = torch.tensor([len(text.tokens) for text in batch])
        longest = int(lengths.max())
        # Attention is causal, so what stands in the padding changes nothing before it; 0 is a token of every model.
        tokens = torch.tensor([text.tokens + [0] * (longest - len(text.tokens)) for text in batch])
        seen = torch.tensor([text.seen + [False] * (longest - len(text.seen)) for text in batch])
        yield tokens, seen, lengths


def _nll_sum(logits: Float[Tensor, "n d_vocab"], targets: Int[Tensor, " n"]) -> float:
    total = 0.0
    for part, target in zip(logits.split(POSITIONS_PER_BLOCK), targets.split(POSITIONS_PER_BLOCK), strict=True):
        log_probs = part.float().log_softmax(dim=-1)
        picked = log_probs.gather(1, target.to(part.device)[:, None])
        total -= float(picked.cpu().double().sum())
    return total


def _kl_sum(clean: Float[Tensor, "n d_vocab"], edited: Float[Tensor, "n d_vocab"]) -> float:
    """Sum over positions of KL(clean || edited), from float32 log-softmax; rounding below 0 counts as 0."""
    total = 0.0
    for p_part, q_part in zip(clean.split(POSITIONS_PER_BLOCK), edited.split(POSITIONS_PER_BLOCK), strict=True):
        log_p, log_q = p_part.float().log_softmax(dim=-1), q_part.float().log_softmax(dim=-1)
        total += float((log_p.exp() * (log_p - log_q)).sum(dim=-1).clamp_min(0.0).cpu().double().sum())
    return total
