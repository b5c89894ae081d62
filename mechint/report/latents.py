"""What the report shows of every latent, gathered into flat arrays: counts, contexts, effects, relatives, map.

The arrays are what `pack` writes into the page and assets/latents.js reads; each comment says what one entry is.
"""

from collections import Counter
from typing import Any, NamedTuple, final

import numpy as np
import torch

from mechint.analysis import (
    Latents,
    bin_edges,
    decoder_map,
    latent_values,
    logit_effects,
    nearest_latents,
    token_consistency,
)
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.models import LanguageModel
from mechint.models.pieces import decoder, token_strings, token_texts
from mechint.sae import SAE

NONE = 0xFFFFFFFF  # an empty place in an array of latents or tokens
LABEL_WIDTH = 4
RELATIVES = 8
LOGITS = 8
MAP_NOTE = (
    "A latent is a point; near points have similar decoder directions (t-SNE of the decoder rows, fixed seed). Only"
    " small distances mean anything: gaps and the sizes of groups do not."
)


@final
class Look(NamedTuple):
    """The arrays of a run's latents, the header that goes with them, and what could not be shown."""

    arrays: dict[str, np.ndarray]
    header: dict[str, Any]
    tokens: dict[str, np.ndarray]  # arrays of token ids, spelled out by `spelled`
    notes: list[str]


def look(
    sae: SAE,
    gathered: Latents,
    activations: Activations,
    model: LanguageModel | None,
    *,
    effects: dict[str, dict[int, float]],
    concepts: dict[int, tuple[str, float]],
) -> Look:
    """Everything but the contexts, which `contexts_of` adds."""
    d_sae, notes = sae.d_sae, []
    names = sorted({name for name, _ in concepts.values()})
    place = {name: index for index, name in enumerate(names)}
    concept, concept_f1 = np.full(d_sae, -1, np.int16), np.zeros(d_sae, np.float32)
    for latent, (name, f1) in concepts.items():
        if 0 <= latent < d_sae:
            concept[latent], concept_f1[latent] = place[name], f1
    near = nearest_latents(sae, k=min(RELATIVES, d_sae - 1)) if d_sae > 1 else None
    partners = gathered.partners
    arrays = {
        "fires": gathered.counts.numpy().astype(np.uint32),  # rows on which the latent is above 0
        "mean": gathered.mean.numpy().astype(np.float32),
        "max": gathered.max.numpy().astype(np.float32),
        "effect": _by_latent(effects.get("effect", {}), d_sae),  # mean KL when removed, NaN: not measured
        "exact": _by_latent(effects.get("exact", {}), d_sae),  # the same, where the ranking measured it
        "attribution": _by_latent(effects.get("attribution", {}), d_sae),  # the ranking's estimate
        "control": np.nan_to_num(_by_latent(effects.get("control", {}), d_sae)).astype(np.uint8),
        "concept": concept,  # place in header["concepts"], -1: none
        "concept_f1": concept_f1,
        "partners": _or_none(partners.latent.numpy()[:, :RELATIVES]),
        "partner_score": _ten_thousandths(partners.jaccard.numpy()[:, :RELATIVES]),
    }
    if near is not None:
        arrays |= {"neighbours": _or_none(near.latent.numpy()), "neighbour_cos": _ten_thousandths(near.cosine.numpy())}
    arrays |= _histograms(gathered)
    header = {
        "hist_bins": arrays["hist"].shape[1],
        "d_sae": d_sae,
        "n_rows": gathered.n_rows,
        "concepts": names,
        "label_width": LABEL_WIDTH,
        "logit_width": 0,
        "neighbours_width": 0 if near is None else near.latent.shape[1],
        "partners_width": arrays["partners"].shape[1],
        "partner_name": "tokens on which both fire, of those on which either does (Jaccard)",
        "map_note": MAP_NOTE,
        "has_tokens": activations.tokens is not None,
    }
    if d_sae >= 3:
        arrays["map"] = np.rint(decoder_map(sae).numpy() * 32767).astype(np.int16)
    tokens = {"label": np.full((d_sae, LABEL_WIDTH), NONE, np.uint32)}
    if activations.tokens is None:
        arrays["consistency"] = np.zeros(d_sae, np.uint8)
        notes.append("The activations were stored without their tokens, so contexts are not shown: collect them again.")
    else:
        tokens["label"] = labels(gathered, activations.tokens.numpy())
        consistency = torch.nan_to_num(token_consistency(gathered, activations), nan=0.0)
        arrays["consistency"] = np.rint(consistency.numpy() * 255).astype(np.uint8)
    if model is not None:
        try:
            found = logit_effects(sae, model, k=LOGITS)
        except MechintError as error:
            notes.append(f"Output tokens are not shown: {error}.")
        else:
            header["logit_width"] = LOGITS
            tokens |= {"promoted": found.promoted.numpy(), "suppressed": found.suppressed.numpy()}
            arrays |= {
                "promoted_value": found.promoted_effect.numpy().astype(np.float32),
                "suppressed_value": found.suppressed_effect.numpy().astype(np.float32),
            }
    return Look(arrays, header, tokens, notes)


def _by_latent(values: dict[int, float], d_sae: int) -> np.ndarray:
    found = np.full(d_sae, np.nan, np.float32)
    for latent, value in values.items():
        if 0 <= latent < d_sae:
            found[latent] = value
    return found


def _or_none(numbers: np.ndarray) -> np.ndarray:
    return np.where(numbers < 0, NONE, numbers).astype(np.uint32)


def _ten_thousandths(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(np.nan_to_num(values), -1, 1) * 10_000).astype(np.int16)


def _histograms(gathered: Latents) -> dict[str, np.ndarray]:
    """Rows by activation, the bins that no latent uses cut off at both ends."""
    counts, edges = gathered.histogram.numpy(), bin_edges()
    used = np.flatnonzero(counts.any(axis=0))
    first, last = (int(used[0]), int(used[-1])) if len(used) else (0, 0)
    return {
        "hist": counts[:, first : last + 1].astype(np.uint32),
        "hist_edges": edges[first : last + 2].astype(np.float32),
    }


def labels(gathered: Latents, stored: np.ndarray) -> np.ndarray:
    """The commonest firing tokens (ids) on each latent's strongest rows, the stronger first among equals."""
    found = np.full((gathered.d_sae, LABEL_WIDTH), NONE, np.uint32)
    for latent, rows in enumerate(gathered.top_rows.numpy()):
        common = Counter(stored[rows[rows >= 0]].tolist()).most_common(LABEL_WIDTH)
        found[latent, : len(common)] = [token for token, _ in common]
    return found


class Contexts(NamedTuple):
    """Windows of the stored text, each named by its latent; their tokens lie in one stream that windows share."""

    arrays: dict[str, np.ndarray]
    stream: np.ndarray  # token ids
    starts: np.ndarray  # where in the stream tokens begin that do not follow on the ones before


def contexts_of(
    sae: SAE, gathered: Latents, activations: Activations, *, n_top: int, n_quantile: int, window: int
) -> Contexts:
    """Of each latent its `n_top` strongest rows and `n_quantile` of each stratum, with the tokens around them.

    Arrays: ctx_first [d_sae + 1] (where a latent's windows begin), and for each window ctx_stratum (0: strongest, else
    1 + stratum from the highest), ctx_value, ctx_text, ctx_position, ctx_start (in the stream), ctx_len, ctx_center,
    ctx_cut (1: text goes on to the left, 2: to the right), ctx_level_at (its first entry in ctx_levels);
    ctx_levels: the latent's value at each token of each window, 255 being its maximum.
    """
    assert activations.tokens is not None and activations.text_ids is not None and activations.positions is not None
    tokens, text_ids = activations.tokens.numpy(), activations.text_ids.numpy()
    latent, row, stratum, value = _chosen(gathered, n_top, n_quantile)
    assert activations.context_ids is not None
    breaks = (np.diff(text_ids) != 0) | (np.diff(activations.context_ids.numpy()) != 0)
    bounds = np.concatenate([[0], breaks.nonzero()[0] + 1, [len(text_ids)]])
    text = np.searchsorted(bounds, row, side="right") - 1
    start = np.maximum(row - window, bounds[text])
    stop = np.minimum(row + window + 1, bounds[text + 1])
    length = stop - start
    level_at = np.concatenate([[0], np.cumsum(length)])
    rows = np.arange(level_at[-1]) - np.repeat(level_at[:-1] - start, length)
    values = latent_values(
        sae, activations, torch.from_numpy(np.repeat(latent, length)), torch.from_numpy(rows)
    ).numpy()
    highest = np.maximum(gathered.max.numpy(), 1e-12)[np.repeat(latent, length)]
    # anything above 0 stays visible as such
    levels = np.where(values > 0, np.maximum(np.rint(values / highest * 255), 1), 0).clip(0, 255)
    union = np.unique(rows)
    cut = (start > bounds[text]).astype(np.uint8) + 2 * (stop < bounds[text + 1]).astype(np.uint8)
    arrays = {
        "ctx_first": np.searchsorted(latent, np.arange(gathered.d_sae + 1)).astype(np.uint32),
        "ctx_stratum": stratum.astype(np.uint8),
        "ctx_value": value.astype(np.float32),
        "ctx_text": text_ids[row].astype(np.uint32),
        "ctx_position": activations.positions.numpy()[row].astype(np.uint32),
        "ctx_start": np.searchsorted(union, start).astype(np.uint32),
        "ctx_len": length.astype(np.uint8),
        "ctx_center": (row - start).astype(np.uint8),
        "ctx_cut": cut,
        "ctx_level_at": level_at[:-1].astype(np.uint32),
        "ctx_levels": levels.astype(np.uint8),
    }
    follows = np.diff(union) == 1
    follows[follows] = ~breaks[union[:-1][follows]]
    starts = np.concatenate([[0], (~follows).nonzero()[0] + 1])
    return Contexts(arrays, tokens[union], starts)


def _chosen(gathered: Latents, n_top: int, n_quantile: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Latent, row, stratum and value of each window, by latent and stratum; a row is shown once a latent."""
    d_sae, n_strata = gathered.d_sae, gathered.settings.n_strata
    rows = [gathered.top_rows[:, :n_top].numpy()]
    values = [gathered.top_values[:, :n_top].numpy()]
    strata = [np.zeros_like(rows[0])]
    for number, level in enumerate(reversed(range(n_strata)), start=1):
        rows.append(gathered.stratum_rows[:, level, :n_quantile].numpy())
        values.append(gathered.stratum_values[:, level, :n_quantile].numpy())
        strata.append(np.full_like(rows[-1], number))
    row, value, stratum = (np.concatenate(parts, axis=1).reshape(-1) for parts in (rows, values, strata))
    latent = np.repeat(np.arange(d_sae), len(row) // d_sae)
    keep = (row >= 0) & (value > 0)
    latent, row, stratum, value = latent[keep], row[keep], stratum[keep], value[keep]
    _, first = np.unique(latent * np.int64(gathered.n_rows) + row, return_index=True)
    first.sort()
    return latent[first], row[first], stratum[first], value[first]


def strata_names(n_strata: int) -> list[str]:
    """What each stratum is called, from the highest."""
    parts = [f"{round(100 * (s - 1) / n_strata)} to {round(100 * s / n_strata)} %" for s in range(n_strata, 0, -1)]
    return [f"{part} of its activations, by strength" for part in parts]


def spelled(
    tokens: dict[str, np.ndarray], model: LanguageModel | None, starts: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays with ids replaced by places in a list of the texts that occur, and that list.

    In the array "stream", the tokens from each of `starts` on are the pieces of one text. Without a model a token is
    shown as its number.
    """
    used = np.unique(np.concatenate([array.reshape(-1) for array in tokens.values()]).astype(np.int64))
    used = used[used != NONE]
    decode = None if model is None else decoder(model.tokenizer)
    texts = [f"#{number}" for number in used.tolist()] if decode is None else token_texts(decode, used.tolist())
    words: dict[str, int] = {}
    place = np.array([words.setdefault(text, len(words)) for text in texts], np.int64)
    placed = {}
    for name, array in tokens.items():
        known = np.minimum(np.searchsorted(used, array), len(used) - 1)
        places = np.where(array == NONE, NONE, place[known]).astype(np.uint32)
        if name == "stream" and decode is not None:
            pieces = [
                piece for part in np.split(array, [] if starts is None else starts[1:])
                for piece in token_strings(decode, part.tolist())
            ]  # fmt: skip
            for at, piece in enumerate(pieces):
                if piece != texts[known[at]]:
                    places[at] = words.setdefault(piece, len(words))
        placed[name] = places
    if "stream" in placed and len(words) < 0xFFFF:
        placed["stream"] = placed["stream"].astype(np.uint16)
    return placed, list(words)
