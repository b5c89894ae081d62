"""Tables for a notebook, as HTML with everything that comes from a text escaped."""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.analysis import context_values, contexts, highlight_html, token_strings, token_texts
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.sae import SAE

Decode = Callable[[list[int]], str]

_CELL = "padding:2px 10px;text-align:left;vertical-align:top"


def table_html(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as an HTML table, the keys of the first one as its header; everything is escaped."""
    if not rows:
        return "<p>(no rows)</p>"
    return _table(list(rows[0]), [[html.escape(str(row.get(key, ""))) for key in rows[0]] for row in rows])


def contexts_html(
    sae: SAE,
    activations: Activations,
    latent: int,
    rows: Sequence[int] | Int[Tensor, " n"],
    decode: Decode,
    *,
    window: int = 12,
) -> str:
    """The texts around `rows`, the token of the row bold, each token on a ground as strong as the latent is there.

    Args:
        rows: of the activations, such as `collect_top_activations(...)[1][latent]`; -1 is left out.
        decode: token ids to text, such as `model.tokenizer.decode`.

    Raises:
        MechintError: no such latent, a row out of range, or activations without tokens.
    """
    if not 0 <= latent < sae.d_sae:
        raise MechintError(f"latent {latent} is not among the {sae.d_sae} of this SAE")
    lines = []
    for context in contexts(activations, rows, window):
        values = context_values(sae, activations, context, latent)
        value = float(values[context.center])
        if value <= 0:  # filled up where a latent fires on fewer rows than were asked for
            continue
        line = highlight_html(token_strings(decode, context.tokens), values, context.center)
        lines.append([f"{value:.2f}", str(context.text_id), line])
    if not lines:
        return f"<p>Latent {latent} fires on none of these rows.</p>"
    return _table(["activation", "text", f"latent {latent}"], lines)


def next_log_probs(logits: Float[Tensor, "pos d_vocab"], tokens: Int[Tensor, " pos"]) -> Float[Tensor, " pos"]:
    """Log-probability (nats) that each position gives to the token that really comes next; NaN at the last one."""
    log_probs = logits[:-1].float().log_softmax(-1)
    found = log_probs.gather(1, tokens[1:, None].to(log_probs.device))[:, 0]
    return torch.cat([found, found.new_full((1,), torch.nan)])


class PredictionChange(NamedTuple):
    """One token's probability as the next one, before and after a change of the model."""

    token: int
    before: float
    after: float


def prediction_changes(
    clean: Float[Tensor, " d_vocab"], changed: Float[Tensor, " d_vocab"], top_k: int = 5
) -> list[PredictionChange]:
    """The `top_k` likeliest tokens before and the `top_k` after, together, likeliest before first.

    Both arguments are logits (or log-probabilities) of one position.
    """
    before, after = clean.float().softmax(-1), changed.float().softmax(-1)
    k = min(top_k, len(before))
    tokens = torch.cat([before.topk(k).indices, after.topk(k).indices]).unique()
    tokens = tokens[before[tokens].argsort(descending=True, stable=True)]
    return [PredictionChange(int(t), float(before[t]), float(after[t])) for t in tokens]


def predictions_html(changes: Sequence[PredictionChange], decode: Decode) -> str:
    """A table of `prediction_changes`, with a bar for each probability."""

    def bar(probability: float, color: str) -> str:
        width = f"display:inline-block;width:{120 * probability:.0f}px;height:0.7em;background:{color}"
        return f'<span style="{width}"></span> {100 * probability:.1f} %'

    lines = [
        [
            f"<code>{html.escape(repr(token_texts(decode, [c.token])[0]))}</code>",
            bar(c.before, "#56B4E9"),
            bar(c.after, "#D55E00"),
        ]
        for c in changes
    ]
    return _table(["next token", "before", "after"], lines)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Cells are HTML already; only the header is escaped here."""
    head = "".join(f'<th style="{_CELL}">{html.escape(name)}</th>' for name in header)
    body = "".join("<tr>" + "".join(f'<td style="{_CELL}">{c}</td>' for c in line) + "</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
