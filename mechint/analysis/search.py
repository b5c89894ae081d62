"""Finding latents by token and by text, and how consistent a latent's tokens are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.analysis.context import needs_tokens
from mechint.analysis.latents import Latents
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.inside import Inside
from mechint.models.pieces import decoder, token_texts


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


class TokenHit(NamedTuple):
    """A latent that has a token among its strongest rows."""

    latent: int
    share: float  # of its strongest rows whose firing token it is
    n: int  # such rows
    highest: float  # its strongest activation on that token, among those rows


def latents_on_token(
    latents: Latents, activations: Activations, tokens: Sequence[int], *, top: int | None = None
) -> list[TokenHit]:
    """Latents whose strongest rows have one of `tokens` (ids) as their firing token, by share, then by activation.

    `top` looks at so many of the strongest rows only. `token_ids` finds the ids of a piece of text.

    Raises:
        MechintError: the activations were stored without tokens.
    """
    stored = needs_tokens(activations)[0]
    rows, values = latents.top_rows[:, :top], latents.top_values[:, :top]
    filled = rows >= 0
    hit = torch.isin(stored[rows.clamp_min(0)], torch.tensor(list(tokens))) & filled
    n = hit.sum(dim=1)
    share = n / filled.sum(dim=1).clamp_min(1)
    highest = values.masked_fill(~hit, -torch.inf).amax(dim=1)
    found = [TokenHit(i, float(share[i]), int(n[i]), float(highest[i])) for i in (n > 0).nonzero().flatten().tolist()]
    return sorted(found, key=lambda hit: (-hit.share, -hit.highest, hit.latent))


def token_ids(tokenizer, query: str, *, exact: bool = False) -> list[int]:  # noqa: ANN001
    """Ids of all tokens whose text contains `query` (case counts), or is it, blanks around it aside, if `exact`.

    Raises:
        MechintError: no token does.
    """
    texts = token_texts(decoder(tokenizer), range(len(tokenizer)))
    found = [i for i, text in enumerate(texts) if (text.strip() == query.strip() if exact else query in text)]
    if not found or not query:
        raise MechintError(f"no token of this tokenizer {'is' if exact else 'contains'} {query!r}; case counts")
    return found


def token_consistency(latents: Latents, activations: Activations, *, top: int | None = None) -> Float[Tensor, " d_sae"]:
    """`feature_consistency_score` of each latent's firing tokens on its strongest rows; NaN for one that never fires.

    Raises:
        MechintError: the activations were stored without tokens.
    """
    stored = needs_tokens(activations)[0]
    rows = latents.top_rows[:, :top]
    tokens = stored[rows.clamp_min(0)].long().masked_fill(rows < 0, -1)
    same = (tokens[:, :, None] == tokens[:, None, :]) & (tokens >= 0)[:, :, None]
    commonest = same.sum(dim=2).amax(dim=1)
    n = (rows >= 0).sum(dim=1)
    return torch.where(n > 0, commonest / n.clamp_min(1), torch.nan)


class Firing(NamedTuple):
    """What fires on a text. Positions that the SAE was not trained on (a BOS row that was left out) count as silent."""

    tokens: list[int]
    feature_acts: Float[Tensor, "pos d_sae"]
    latents: list[int]  # by their highest value on the text, highest first
    highest: list[float]
    position: list[int]  # where


def fires_on(inside: Inside, text: str, *, k: int = 20, relative_to: Latents | None = None) -> Firing:
    """Run a text through the model and the SAE, and list the `k` latents that fire most strongly on it.

    With `relative_to`, "strongly" means relative to each latent's own maximum over the activations, which brings up
    latents that are small everywhere but as strong as they get here; those that never fired there come first.

    Raises:
        MechintError: an empty text, k below 1.
    """
    if k < 1:
        raise MechintError(f"k must be at least 1, got {k}")
    tokens = inside.tokenize([text])[0]
    with torch.inference_mode():
        x = inside.model.activations(torch.tensor([tokens]), inside.hook_name)[0]
        acts = inside.sae.encode(x.to(inside.sae.W_enc.dtype)).float().cpu()
        acts[: inside.first_seen()] = 0.0
    acts = acts.clone()  # a plain tensor, that the caller may change
    highest, position = acts.max(dim=0)
    score = highest if relative_to is None else highest / relative_to.max.clamp_min(1e-6)
    order = [i for i in score.argsort(descending=True, stable=True).tolist() if highest[i] > 0][:k]
    return Firing(tokens, acts, order, [float(highest[i]) for i in order], [int(position[i]) for i in order])
