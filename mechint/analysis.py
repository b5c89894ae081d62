"""What latents do and how they relate: top activations with their contexts, and similarity of decoder directions.

Everything streams: memory is bounded by a batch or a block, not by the number of rows or pairs.
"""

import html
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.sae import SAE

# Largest [rows, d_sae] block of feature_acts made at once: 128 MB in float32, whatever the size of the dictionary.
MAX_BLOCK_ELEMENTS = 2**25
# Candidates merged at once by collect_top_activations; a batch with more is taken in pieces, which raise the bar.
MAX_CANDIDATES = 2**20
# decoder_cosine_similarity refuses to make a larger matrix than this (8 GB in float32 is 46,000 latents).
MAX_SIMILARITY_BYTES = 8 * 2**30


# --- top activations -------------------------------------------------------------------------------------------------


def collect_top_activations(
    sae: SAE,
    acts: Float[Tensor, "n d_in"] | Activations,
    k: int = 20,
    batch_size: int = 4096,
    device: str | None = None,
) -> tuple[Float[Tensor, "d_sae k"], Int[Tensor, "d_sae k"]]:
    """For each latent its `k` highest values over all rows and the rows they are on, highest first.

    Equal values are ordered by row, so the result does not depend on `batch_size`. A latent that fires on fewer than
    `k` rows is filled up with 0 on the first rows where it is silent; with fewer than `k` rows in all, the rest is -inf
    with row -1. Results are on the CPU.

    Raises:
        MechintError: `acts` is not as wide as the SAE, or `k` is below 1.
    """
    d_in = acts.shape[1] if isinstance(acts, Tensor) else acts.d_in
    if d_in != sae.d_in:
        raise MechintError(f"the activations are {d_in} wide (d_in), the SAE expects {sae.d_in}")
    if k < 1:
        raise MechintError(f"k must be at least 1, got {k}")
    if device is not None:
        sae = sae.to(device)
    top = _Top(sae.d_sae, k, sae.W_enc.device)
    batch_size = max(1, min(batch_size, MAX_BLOCK_ELEMENTS // sae.d_sae))
    with torch.inference_mode():
        start = 0
        for x in _batches(acts, batch_size):
            feature_acts = sae.encode(x.to(sae.W_enc.device, torch.float32))
            top.note_silent_rows(feature_acts)
            top.add(feature_acts, start)
            start += len(x)
        return top.result(n_rows=start)


def _batches(acts: Float[Tensor, "n d_in"] | Activations, batch_size: int) -> Iterator[Tensor]:
    return iter(acts.split(batch_size)) if isinstance(acts, Tensor) else acts.batches(batch_size)


class _Top:
    """The best `k` positive values of each latent so far; only values above a latent's k-th best are looked at."""

    def __init__(self, d_sae: int, k: int, device: torch.device) -> None:
        self.k = k
        self.values = torch.full((d_sae, k), -torch.inf, device=device)
        self.rows = torch.full((d_sae, k), -1, dtype=torch.int64, device=device)
        self.silent: list[Tensor] = []  # [rows, d_sae] flags of the first 2k rows: enough to fill any latent up
        self.n_silent_rows = 0

    def note_silent_rows(self, feature_acts: Float[Tensor, "batch d_sae"]) -> None:
        missing = 2 * self.k - self.n_silent_rows
        if missing > 0:
            self.silent.append(feature_acts[:missing] <= 0)
            self.n_silent_rows += len(self.silent[-1])

    def add(self, feature_acts: Float[Tensor, "batch d_sae"], start: int) -> None:
        bar = self.values[:, -1].clamp_min(0.0)
        row, latent = (feature_acts > bar).nonzero(as_tuple=True)
        if len(row) > MAX_CANDIDATES and len(feature_acts) > 1:
            half = len(feature_acts) // 2
            self.add(feature_acts[:half], start)
            self.add(feature_acts[half:], start + half)
        elif len(row):
            self._merge(latent, feature_acts[row, latent], row + start)

    def _merge(self, latent: Int[Tensor, " c"], value: Float[Tensor, " c"], row: Int[Tensor, " c"]) -> None:
        changed = torch.unique(latent)
        # What is held comes first and has lower rows, so stable sorting keeps equal values in the order of their rows.
        latent = torch.cat([changed.repeat_interleave(self.k), latent])
        value = torch.cat([self.values[changed].flatten(), value])
        row = torch.cat([self.rows[changed].flatten(), row])
        order = value.sort(descending=True, stable=True).indices
        order = order[latent[order].sort(stable=True).indices]
        latent, value, row = latent[order], value[order], row[order]
        first = torch.searchsorted(latent, latent)  # where the run of this latent begins
        rank = torch.arange(len(latent), device=latent.device) - first
        keep = rank < self.k
        self.values[latent[keep], rank[keep]] = value[keep]
        self.rows[latent[keep], rank[keep]] = row[keep]

    def result(self, n_rows: int) -> tuple[Float[Tensor, "d_sae k"], Int[Tensor, "d_sae k"]]:
        values, rows = self.values.cpu(), self.rows.cpu()
        if self.silent:
            silent = torch.cat(self.silent).T.cpu()  # [d_sae, rows]
            filled = (rows >= 0).sum(dim=1)
            for latent in (filled < min(self.k, n_rows)).nonzero().flatten().tolist():
                count = int(filled[latent])
                fill = silent[latent].nonzero().flatten()[: self.k - count]
                values[latent, count : count + len(fill)] = 0.0
                rows[latent, count : count + len(fill)] = fill
        return values, rows


def search_token(feature_texts: Mapping[int, Sequence[str]] | Sequence[Sequence[str]], query: str) -> list[int]:
    """The latents, in order, that have `query` in at least one of their texts (tokens or contexts); case counts.

    `feature_texts` maps a latent to its texts, or lists the texts of latents 0, 1, 2, ...
    """
    items = feature_texts.items() if isinstance(feature_texts, Mapping) else enumerate(feature_texts)
    return [latent for latent, texts in items if any(query in text for text in texts)]


def feature_consistency_score(tokens: Sequence[str] | Sequence[int]) -> float:
    """The share of the commonest token: 1.0 if a latent's top tokens are all the same. 0.0 for none at all."""
    if len(tokens) == 0:
        return 0.0
    return Counter(tokens).most_common(1)[0][1] / len(tokens)


# --- contexts --------------------------------------------------------------------------------------------------------


class Context(NamedTuple):
    """A row of the activations among its neighbours in the text."""

    row: int
    text_id: int
    position: int  # of the firing token in its text, as the model saw it
    rows: list[int]  # rows of the tokens shown; `activations.rows(torch.tensor(rows))` are their activations
    tokens: list[int]  # token ids shown
    center: int  # index in `tokens` of the firing token


def contexts(activations: Activations, rows: Sequence[int] | Int[Tensor, " n"], window: int = 10) -> list[Context]:
    """The `window` tokens before and after each row, within its text, from the tokens stored with the activations.

    Rows of -1 (unfilled entries of `collect_top_activations`) are left out.

    Raises:
        MechintError: the activations were stored without tokens, or a row is out of range.
    """
    tokens, text_ids, positions = activations.tokens, activations.text_ids, activations.positions
    if tokens is None or text_ids is None or positions is None:
        raise MechintError(
            f"{activations.path} was stored without its tokens, so contexts cannot be shown: collect it again with"
            " collect_activations.py"
        )
    found = []
    for row in rows.tolist() if isinstance(rows, Tensor) else rows:
        if row == -1:
            continue
        if not 0 <= row < activations.n_rows:
            raise MechintError(f"row {row} is not among the {activations.n_rows} rows of {activations.path}")
        start, stop = max(0, row - window), min(activations.n_rows, row + window + 1)
        same = (text_ids[start:stop] == text_ids[row]).nonzero().flatten() + start
        shown = same.tolist()
        found.append(
            Context(
                row=row,
                text_id=int(text_ids[row]),
                position=int(positions[row]),
                rows=shown,
                tokens=tokens[same].tolist(),
                center=shown.index(row),
            )
        )
    return found


def context_values(sae: SAE, activations: Activations, context: Context, latent: int) -> Float[Tensor, " shown"]:
    """What `latent` is on each token of the context, from the stored activations (no model is needed)."""
    with torch.inference_mode():
        x = activations.rows(torch.tensor(context.rows)).to(sae.W_enc.device)
        return sae.encode(x)[:, latent].cpu()


def highlight_text(tokens: Sequence[str], center: int) -> str:
    """The tokens in a row, the one at `center` between >>> and <<<; line breaks are shown as the sign for return."""
    shown = [token.replace("\n", "\u21b5") for token in tokens]
    return "".join(shown[:center]) + ">>>" + shown[center] + "<<<" + "".join(shown[center + 1 :])


def highlight_html(
    tokens: Sequence[str], values: Sequence[float] | Float[Tensor, " shown"], center: int | None = None
) -> str:
    """One line of HTML for a notebook: each token on a background as strong as its value, `center` in bold.

    Values are scaled to the largest one; the value itself is in the tooltip. The tokens are escaped.
    """
    numbers = [float(value) for value in values]
    if len(numbers) != len(tokens):
        raise MechintError(f"{len(tokens)} tokens but {len(numbers)} values")
    highest = max([*numbers, 0.0]) or 1.0
    parts = []
    for index, (token, value) in enumerate(zip(tokens, numbers, strict=True)):
        style = f"background:rgba(255,140,0,{max(value, 0.0) / highest:.2f})"
        if index == center:
            style += ";font-weight:bold;text-decoration:underline"
        text = html.escape(token).replace("\n", "\u21b5")
        parts.append(f'<span style="{style}" title="{value:.3g}">{text}</span>')
    return '<div style="white-space:pre-wrap;font-family:monospace">' + "".join(parts) + "</div>"


def token_strings(decode: Callable[[list[int]], str], tokens: Sequence[int]) -> list[str]:
    """Each token as text; `decode` is a tokenizer's, such as `model.tokenizer.decode`."""
    return [decode([token]) for token in tokens]


# --- decoder directions ----------------------------------------------------------------------------------------------


def decoder_cosine_similarity(sae: SAE) -> Float[Tensor, "d_sae d_sae"]:
    """Cosines between all decoder rows, the diagonal (1) included, as one product of unit rows: O(d_sae^2) memory.

    Raises:
        MechintError: the matrix would be larger than 8 GB.
    """
    size = 4 * sae.d_sae**2
    if size > MAX_SIMILARITY_BYTES:
        raise MechintError(
            f"the similarity matrix of {sae.d_sae} latents takes {size / 1e9:.0f} GB: use top_decoder_pairs, or"
            " decoder_similarity_blocks to see it piece by piece"
        )
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    return unit @ unit.T


def decoder_similarity_blocks(
    sae: SAE, block_size: int = 1024
) -> Iterator[tuple[int, int, Float[Tensor, "rows columns"]]]:
    """`(first row, first column, block)` over the upper triangle of the similarity matrix, diagonal blocks whole.

    Products are taken in float64 and rounded, so equal directions have exactly equal cosines.
    """
    weights = sae.W_dec.detach().cpu()

    def unit(start: int) -> Tensor:
        return torch.nn.functional.normalize(weights[start : start + block_size].double(), dim=1)

    for first_row in range(0, sae.d_sae, block_size):
        left = unit(first_row)
        for first_column in range(first_row, sae.d_sae, block_size):
            yield first_row, first_column, (left @ unit(first_column).T).float()


def top_decoder_pairs(sae: SAE, top_k: int = 20) -> list[tuple[int, int, float]]:
    """The `top_k` pairs `(i, j, cosine)`, i < j, of the most similar decoder rows, most similar first.

    Exactly `top_k` pairs (or all, if there are fewer), each once; equal cosines are ordered by (i, j). The memory is
    that of a block, whatever d_sae is.
    """
    if top_k < 1:
        raise MechintError(f"top_k must be at least 1, got {top_k}")
    best: list[tuple[float, int, int]] = []  # (-cosine, i, j), ascending
    for first_row, first_column, block in decoder_similarity_blocks(sae):
        if first_row == first_column:
            block = block.masked_fill(torch.ones_like(block, dtype=torch.bool).tril(), -torch.inf)
        flat = block.flatten()
        # Against a full list only values that reach its last one can still matter.
        lowest = -best[-1][0] if len(best) == top_k else -torch.inf
        at_least = flat.topk(min(top_k, len(flat))).values[-1].clamp_min(lowest)
        above = (flat > at_least).nonzero().flatten()
        equal = (flat == at_least).nonzero().flatten()[:top_k]  # ascending, so the first ones win the tie
        for index in torch.cat([above, equal]).tolist():
            value = float(flat[index])
            if value > -torch.inf:
                row, column = divmod(index, block.shape[1])
                best.append((-value, first_row + row, first_column + column))
        best = sorted(best)[:top_k]
    return [(i, j, -negative) for negative, i, j in best]
