"""Rank every latent by what removing it does to the model's predictions over a set of texts."""

import csv
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from mechint.ablation.engines import Engine, Pair, make_engine
from mechint.errors import MechintError
from mechint.eval import Text
from mechint.inside import Model, as_model, check_fit
from mechint.models.matmul import full_float32
from mechint.models.pieces import decoder, token_texts
from mechint.provenance import atomic_path
from mechint.sae import SAE

# The original's columns first, in its order.
COLUMNS = (
    "feature_idx",
    "mean_kl",
    "max_kl",
    "max_kl_prompt",
    "max_kl_token",
    "max_kl_token_position",
    "num_texts",
    "mean_kl_no_bos",
    "n_active_positions",
    "n_active_texts",
    "mean_ce_change",
)
# Texts x latents of a block, so that a block ends, and its result is kept, every minute or so.
MAX_TEXT_LATENTS = 2**16
SAVE_SECONDS = 10.0


@dataclass
class Totals:
    """Sums over the texts done so far, one entry a latent (of those asked for)."""

    mean_kl: Float[Tensor, " latent"]
    mean_kl_no_bos: Float[Tensor, " latent"]
    max_kl: Float[Tensor, " latent"]
    max_text: Tensor  # -1 where no text has a KL above 0
    max_position: Tensor
    n_active_positions: Tensor
    n_active_texts: Tensor
    mean_ce_change: Float[Tensor, " latent"]
    kl_squares: Float[Tensor, " latent"]  # of each text's mean over positions, for a standard error over texts

    @classmethod
    def zeros(cls, n: int) -> "Totals":
        counts = ("max_text", "max_position", "n_active_positions", "n_active_texts")
        return cls(
            **{
                field.name: torch.full(
                    (n,),
                    -1 if field.name in ("max_text", "max_position") else 0,
                    dtype=torch.int64 if field.name in counts else torch.float64,
                )
                for field in fields(cls)
            }
        )


def rank_features_by_ablation(
    sae: SAE,
    model: Any,
    hook_name: str,
    texts: Sequence[str],
    feature_subset: Iterable[Any] | str | None = None,
    show_progress: bool = True,
    *,
    prepend_bos: bool | None = None,
    context_size: int | None = None,
    batch_size: int = 128,
    partial_path: Path | None = None,
    fingerprint: str = "",
) -> list[dict[str, Any]]:
    """KL(clean || latent removed) of each latent, largest mean first; ties keep the order asked for.

    The latent is removed at all positions of a text at once: v - f_i(v) * W_dec[i] (at the hook that a
    transcoder replaces). All KLs are in nats, from the next-token distributions of every position:

    - `mean_kl`: mean over texts of the mean over positions, BOS included (the original's definition);
    - `mean_kl_no_bos`: the same without the position of the prepended BOS;
    - `max_kl`, with its text, token and position (counted from 0, BOS included; empty and -1 if never above 0);
    - `n_active_positions`, `n_active_texts`: where the latent fires; 0 means that every KL is exactly 0;
    - `mean_ce_change`: mean over texts of the mean change of the cross-entropy of a text's own next tokens (above 0:
      the text becomes less likely without the latent).

    For a GPT-NeoX the error of every KL against float64 is below 1e-6; for others see `GeneralEngine`.

    Args:
        model: a `LanguageModel`, or a `TransformerBridge`.
        feature_subset: indices, or "1,2,8-15"; None means all.
        prepend_bos: the SAE's own setting (else True) if not given.
        batch_size: pairs of latent and text run at once.
        partial_path: where to keep the sums of finished texts; a rerun with the same `fingerprint` goes on from there.
            The file is removed by the caller, once the result is safe.

    Raises:
        MechintError: an SAE of another hook, width or processing, an index out of range, no text, not finite values.
    """
    known = as_model(model)
    features = feature_indices(feature_subset, sae.d_sae)
    if not texts:
        raise MechintError("no texts to ablate on: give at least one")
    if batch_size < 1:
        raise MechintError(f"batch_size must be at least 1, got {batch_size}")
    if prepend_bos is None:
        prepend_bos = bool(sae.metadata.get("prepend_bos", True))
    with torch.inference_mode(), full_float32():
        check_fit(sae, known, hook_name)
        token_lists = known.tokenize(list(texts), prepend_bos=prepend_bos, context_size=context_size)
        for text, tokens in zip(texts, token_lists, strict=True):
            if not tokens:
                raise MechintError(f"the text {text[:40]!r} has no tokens: remove it or prepend BOS")
    return rank_on_contexts(
        sae, known, hook_name, texts, token_lists, features, prepend_bos=prepend_bos, batch_size=batch_size,
        progress=show_progress, partial_path=partial_path, fingerprint=fingerprint,
    )  # fmt: skip


def rank_on_contexts(
    sae: SAE,
    model: Model,
    hook_name: str,
    texts: Sequence[str],
    token_lists: list[list[int]],
    features: list[int],
    *,
    prepend_bos: bool,
    batch_size: int = 128,
    progress: bool = False,
    partial_path: Path | None = None,
    fingerprint: str = "",
) -> list[dict[str, Any]]:
    """`rank_features_by_ablation` on what the model reads (BOS included), for an SAE that is known to fit. `texts` are
    what each list of tokens is called in the result."""
    whole = [Text(tokens, [True] * len(tokens)) for tokens in token_lists]
    totals = ablate_texts(
        sae, model, hook_name, whole, features, prepend_bos=prepend_bos, batch_size=batch_size,
        progress=progress, partial_path=partial_path, fingerprint=fingerprint,
    )  # fmt: skip
    return _rows(totals, features, texts, token_lists, model)


def ablate_texts(
    sae: SAE,
    model: Model,
    hook_name: str,
    texts: Sequence[Text],
    latents: list[int],
    *,
    prepend_bos: bool = True,
    batch_size: int = 128,
    progress: bool = False,
    partial_path: Path | None = None,
    fingerprint: str = "",
) -> Totals:
    """Sums over `texts` of what removing each of `latents` does, for an SAE that is known to fit.

    A latent is removed at the positions of a text that the SAE may touch (`Text.seen`). The rest is as in
    `rank_features_by_ablation`.
    """
    with torch.inference_mode(), full_float32():
        engine = make_engine(sae, model, hook_name, texts[0].tokens)
        return _all_texts(
            engine, list(texts), latents, sae.d_sae, prepend_bos, batch_size, progress, partial_path, fingerprint
        )


def feature_indices(subset: Iterable[Any] | str | None, d_sae: int) -> list[int]:
    """The latents that `subset` names, in its order without repeats; all of them for None.

    Raises `MechintError` for an empty subset, one that is not integers (or "1,2,8-15"), and an index out of range.
    """
    if subset is None:
        return list(range(d_sae))
    found: list[int] = []
    if isinstance(subset, str):
        for word in subset.split(",") if subset.strip() else []:
            match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", word)
            if match is None:
                raise MechintError(
                    f"feature subset {subset!r}: {word.strip()!r} is not a latent's index; write 1,2,3 or 0-99,512"
                )
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                raise MechintError(f"feature subset {subset!r}: {word.strip()!r} runs backwards")
            # An end far out of range is not worth a list of its own before it is refused.
            found += range(first, min(last, max(first, d_sae)) + 1)
    else:
        for index in subset:
            number: Any = index.item() if isinstance(index, Tensor | np.generic) else index
            if isinstance(number, bool) or not isinstance(number, int):
                raise MechintError(f"feature subset: {index!r} is not a latent's index, which is an integer")
            found.append(number)
    if not found:
        raise MechintError("the feature subset is empty: name latents such as 1,2,3 or 0-99, or leave it out for all")
    for index in found:
        if not 0 <= index < d_sae:
            raise MechintError(f"feature subset: latent {index} is out of range, the SAE has latents 0 to {d_sae - 1}")
    return list(dict.fromkeys(found))


def save_ablation_rows(rows: Sequence[dict[str, Any]], output_path: str | Path, *, overwrite: bool = True) -> None:
    """Write the rows as CSV, atomically; the original's columns come first."""
    with (
        atomic_path(output_path, overwrite=overwrite) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _all_texts(
    engine: Engine,
    texts: list[Text],
    features: list[int],
    d_sae: int,
    prepend_bos: bool,
    batch_size: int,
    show_progress: bool,
    partial_path: Path | None,
    fingerprint: str,
) -> Totals:
    totals, done = Totals.zeros(len(features)), 0
    if partial_path is not None:
        totals, done = _read_partial(partial_path, fingerprint, totals)
    wanted = torch.zeros(d_sae, dtype=torch.bool)
    wanted[features] = True
    column = torch.full((d_sae,), -1, dtype=torch.int64)
    column[features] = torch.arange(len(features))
    saved = time.monotonic()
    begun, seen = done, 0
    # In a log file a line a minute will do.
    every = 0.1 if sys.stderr.isatty() else 60.0
    with tqdm(desc="ablating", unit=" pairs", disable=not show_progress, smoothing=0.05, mininterval=every) as bar:
        while done < len(texts):
            rest = [text.tokens for text in texts[done:]]
            block = _block(rest, engine.positions_at_once(), max(1, MAX_TEXT_LATENTS // len(features)))
            seen_block = [text.seen for text in texts[done : done + len(block)]]
            active = (engine.open(block, seen_block) != 0).cpu() & wanted
            pairs = _pairs(active)
            seen += len(pairs)
            # How many pairs the texts to come hold is not known yet; they are taken to be like those seen.
            bar.total = round(seen * (len(texts) - begun) / (done + len(block) - begun))
            _one_block(engine, block, pairs, active, totals, column, done, prepend_bos, batch_size, bar)
            done += len(block)
            if partial_path is not None and done < len(texts) and time.monotonic() - saved > SAVE_SECONDS:
                _write_partial(partial_path, fingerprint, totals, done)
                saved = time.monotonic()
    return totals


def _block(token_lists: list[list[int]], max_positions: int, max_texts: int) -> list[list[int]]:
    """The next texts in order, as many as fit; always at least one."""
    longest = 0
    for count, tokens in enumerate(token_lists):
        longest = max(longest, len(tokens))
        if count == max_texts or (count > 0 and longest * (count + 1) > max_positions):
            return token_lists[:count]
    return token_lists


def _pairs(active: Bool[Tensor, "text pos d_sae"]) -> list[Pair]:
    start = active.to(torch.uint8).argmax(1)
    return [
        Pair(text, (latent,), int(first))
        for (text, latent), first in zip(
            torch.nonzero(active.any(1)).tolist(), start[active.any(1)].tolist(), strict=True
        )
    ]


def _one_block(
    engine: Engine,
    block: list[list[int]],
    pairs: list[Pair],
    active: Bool[Tensor, "text pos d_sae"],
    totals: Totals,
    column: Tensor,
    first_text: int,
    prepend_bos: bool,
    batch_size: int,
    bar: tqdm,
) -> None:
    """Add a block's pairs to `totals`."""
    both = torch.zeros(2, len(pairs), active.shape[1], dtype=torch.float64)
    row_of = {pair: row for row, pair in enumerate(pairs)}
    doubtful: list[Pair] = []
    for batch in engine.batches(pairs, batch_size):
        effect = engine.effect(batch)
        again = set(engine.doubtful(effect.kl))
        both[:, [row_of[pair] for pair in batch]] = torch.stack(effect)
        doubtful += [pair for row, pair in enumerate(batch) if row in again]
        bar.update(len(batch) - len(again))
    for batch in engine.batches(doubtful, batch_size):
        both[:, [row_of[pair] for pair in batch]] = torch.stack(engine.precise_effect(batch))
        bar.update(len(batch))
    result, ce_change = both
    if not bool(torch.isfinite(both).all()):
        pair = pairs[int(torch.nonzero(~torch.isfinite(both))[0, 1])]
        raise MechintError(
            f"removing latent {pair.latents[0]} from text {first_text + pair.text + 1} gives predictions that are not"
            " finite: check the model and the SAE with scripts/eval_sae.py"
        )
    if not pairs:
        return
    text = torch.tensor([pair.text for pair in pairs])
    at = column[torch.tensor([pair.latents[0] for pair in pairs])]
    lengths = torch.tensor([len(tokens) for tokens in block])[text]
    # A KL is not negative; what rounding leaves below 0 is 0.
    result.clamp_(min=0)
    mean_kl = result.sum(1) / lengths
    totals.mean_kl.index_add_(0, at, mean_kl)
    totals.kl_squares.index_add_(0, at, mean_kl.square())
    totals.mean_ce_change.index_add_(0, at, ce_change.sum(1) / (lengths - 1).clamp(min=1))
    bos = int(prepend_bos)
    totals.mean_kl_no_bos.index_add_(0, at, result[:, bos:].sum(1) / (lengths - bos).clamp(min=1))
    count = active[text, :, torch.tensor([pair.latents[0] for pair in pairs])].sum(1)
    totals.n_active_positions.index_add_(0, at, count)
    totals.n_active_texts.index_add_(0, at, torch.ones_like(at))
    highest, position = result.max(1)
    # Pairs are in the order of the texts, and the first of equal maxima counts.
    for row in torch.nonzero(highest > totals.max_kl[at]).flatten().tolist():
        latent = at[row]
        if highest[row] > totals.max_kl[latent]:
            totals.max_kl[latent] = highest[row]
            totals.max_text[latent] = first_text + text[row]
            totals.max_position[latent] = position[row]


def _rows(
    totals: Totals, features: list[int], texts: Sequence[str], token_lists: list[list[int]], model: Model
) -> list[dict[str, Any]]:
    rows = []
    decode = decoder(model.tokenizer)
    for index, feature in enumerate(features):
        text, position = int(totals.max_text[index]), int(totals.max_position[index])
        (token,) = token_texts(decode, [token_lists[text][position]]) if text >= 0 else ("",)
        values = (
            feature,
            float(totals.mean_kl[index]) / len(texts),
            float(totals.max_kl[index]),
            texts[text] if text >= 0 else "",
            token,
            position,
            len(texts),
            float(totals.mean_kl_no_bos[index]) / len(texts),
            int(totals.n_active_positions[index]),
            int(totals.n_active_texts[index]),
            float(totals.mean_ce_change[index]) / len(texts),
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return sorted(rows, key=lambda row: -row["mean_kl"])


def _read_partial(path: Path, fingerprint: str, empty: Totals) -> tuple[Totals, int]:
    """The sums that an earlier run with the same inputs left, and how many texts they cover."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != fingerprint:
                return empty, 0
            return Totals(**{name: file.get_tensor(name) for name in file.keys()}), int(metadata["texts_done"])  # noqa: SIM118
    except (FileNotFoundError, SafetensorError, TypeError, ValueError, KeyError):
        return empty, 0


def _write_partial(path: Path, fingerprint: str, totals: Totals, done: int) -> None:
    with atomic_path(path) as temporary:
        save_file(asdict(totals), temporary, metadata={"fingerprint": fingerprint, "texts_done": str(done)})
