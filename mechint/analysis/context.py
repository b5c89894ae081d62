"""Rows of stored activations among their neighbours in the text, and how a line of text is shown."""

import html
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.analysis.entries import active_entries
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.sae import SAE

ROWS_AT_ONCE = 2**15  # read for `latent_values`
EMPTY = "\u00b7"  # how a token without text of its own is shown where it matters


class Context(NamedTuple):
    """A row of the activations among its neighbours in the text."""

    row: int
    text_id: int
    position: int  # of the firing token in its text, as the model saw it
    rows: list[int]  # rows of the tokens shown; `activations.rows(torch.tensor(rows))` are their activations
    tokens: list[int]  # token ids shown
    center: int  # index in `tokens` of the firing token


def needs_tokens(
    activations: Activations,
) -> tuple[Int[Tensor, " n_rows"], Int[Tensor, " n_rows"], Int[Tensor, " n_rows"]]:
    """Token, text and position of each row. Raises `MechintError` where they were not stored."""
    tokens, text_ids, positions = activations.tokens, activations.text_ids, activations.positions
    if tokens is None or text_ids is None or positions is None:
        raise MechintError(
            f"{activations.path} was stored without its tokens, so contexts cannot be shown: collect it again with"
            " collect_activations.py"
        )
    return tokens, text_ids, positions


def contexts(activations: Activations, rows: Sequence[int] | Int[Tensor, " n"], window: int = 10) -> list[Context]:
    """The `window` tokens before and after each row, as far as they are of its text and the model read them together
    with it, from the tokens stored with the activations.

    Rows of -1 (unfilled entries of `collect_top_activations`) are left out.

    Raises:
        MechintError: the activations were stored without tokens, or a row is out of range.
    """
    tokens, text_ids, positions = needs_tokens(activations)
    together = activations.context_ids
    assert together is not None
    found = []
    for row in rows.tolist() if isinstance(rows, Tensor) else rows:
        if row == -1:
            continue
        if not 0 <= row < activations.n_rows:
            raise MechintError(f"row {row} is not among the {activations.n_rows} rows of {activations.path}")
        start, stop = max(0, row - window), min(activations.n_rows, row + window + 1)
        same = (text_ids[start:stop] == text_ids[row]) & (together[start:stop] == together[row])
        same = same.nonzero().flatten() + start
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


def latent_values(
    sae: SAE, activations: Activations, latents: Int[Tensor, " pairs"], rows: Int[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """What latent `latents[i]` is on row `rows[i]`, for many pairs at once, from the stored activations.

    Where a latent's value depends on no other latent, only the products that are asked for are made, latent by latent;
    else (topk) the rows asked for are encoded whole, each once. Pairs sorted by latent are fastest.
    """
    values = torch.zeros(len(rows))
    if len(rows) == 0:
        return values
    if int(latents.min()) < 0 or int(latents.max()) >= sae.d_sae:
        raise MechintError(f"latents must lie between 0 and {sae.d_sae - 1}")
    if not sae.latents_are_independent:
        return _from_entries(sae, activations, latents, rows)
    with torch.inference_mode():
        order = latents.argsort(stable=True)
        numbers, counts = latents[order].unique_consecutive(return_counts=True)
        start = 0
        for latent, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            here = order[start : start + count]
            start += count
            x = activations.rows(rows[here]).to(sae.W_enc.device)
            values[here] = sae.only(slice(latent, latent + 1)).encode(x)[:, 0].float().cpu()
    return values


def _from_entries(
    sae: SAE, activations: Activations, latents: Int[Tensor, " pairs"], rows: Int[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """`latent_values` from the active entries of the rows; a pair without one is 0."""
    values = np.zeros(len(rows), np.float32)
    wanted, place = rows.unique(return_inverse=True)
    order = place.argsort(stable=True).numpy()  # pairs by row
    keys = (place * sae.d_sae + latents).numpy()[order]
    for first in range(0, len(wanted), ROWS_AT_ONCE):
        x = activations.rows(wanted[first : first + ROWS_AT_ONCE])
        for entries in active_entries(sae, x):
            r, latent, value = entries.flat()
            start = first + entries.row
            here = slice(*np.searchsorted(keys, np.array([start, start + entries.n_rows]) * sae.d_sae))
            found = (start + r) * np.int64(sae.d_sae) + latent  # ascending, as entries are
            at = np.searchsorted(found, keys[here])
            hit = at < len(found)
            hit[hit] = found[at[hit]] == keys[here][hit]
            values[order[here][hit]] = value[at[hit]]
    return torch.from_numpy(values)


def highlight_text(tokens: Sequence[str], center: int) -> str:
    """The tokens in a row, the one at `center` between >>> and <<<; line breaks are shown as the sign for return, and a
    token that completes no character as a dot."""
    shown = [token.replace("\n", "\u21b5") for token in tokens]
    shown[center] = shown[center] or EMPTY
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
        text = html.escape(token or (EMPTY if value > 0 or index == center else "")).replace("\n", "\u21b5")
        parts.append(f'<span style="{style}" title="{value:.3g}">{text}</span>')
    return '<div style="white-space:pre-wrap;font-family:monospace">' + "".join(parts) + "</div>"
