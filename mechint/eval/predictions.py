"""Cross-entropy and KL of next-token predictions, in one pass over tiles of the vocabulary.

For a position with clean logits a and changed logits b, with p = softmax(a),

    cross-entropy  logsumexp(a) - a[target]
    KL(clean || changed) = E_p[a] - E_p[b] - logsumexp(a) + logsumexp(b).

logsumexp and the two expectations are sums over the vocabulary, so a tile of logits is made, summed up and forgotten
while it is in the processor's cache; the tiles' sums are put together as those of a streaming softmax are (Milakov and
Gimelshein 2018, "Online normalizer calculation for softmax"). The whole [positions, d_vocab] matrices never exist, and
no log-softmax is written out. Logits and a tile's sums are float32, sums over tiles float64.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.models.matmul import linear

# Vocabulary a tile and positions at once: their product in float32 is 8 MB.
TILE = 2048
ROWS = 1024


@runtime_checkable
class Head(Protocol):
    """Where logits come from: tiles of the vocabulary of given rows of what the model's pass returned."""

    n_tiles: int
    tile_size: int

    def tile(self, final: Tensor, index: int) -> Tensor: ...


class Unembedding:
    """Logits from the last hidden state: a product with a tile of W_U at a time."""

    def __init__(
        self, weight: Float[Tensor, "d_vocab d_model"], bias: Float[Tensor, " d_vocab"] | None, tile_size: int = TILE
    ):
        self.tile_size = tile_size
        self.weights = weight.split(tile_size)
        self.biases = [None] * len(self.weights) if bias is None else list(bias.split(tile_size))
        self.n_tiles = len(self.weights)

    def tile(self, final: Float[Tensor, "rows d_model"], index: int) -> Float[Tensor, "rows _"]:
        return linear(final, self.weights[index], self.biases[index]).float()


class WholeLogits:
    """Logits that a model has made already."""

    def __init__(self, d_vocab: int):
        self.tile_size = TILE
        self.n_tiles = -(-d_vocab // TILE)

    def tile(self, final: Float[Tensor, "rows d_vocab"], index: int) -> Float[Tensor, "rows _"]:
        # a copy, because a tile is used up in place
        return final[:, index * TILE : (index + 1) * TILE].to(torch.float32, copy=True)


class Fixed(NamedTuple):
    """Predictions that depend on the position alone: those of a hook that holds the same value in every text."""

    tiles: list[Float[Tensor, "pos edit _"]]
    logsumexp: Float[Tensor, "edit pos"]  # float64


class Compared(NamedTuple):
    """Per position, in float64 on the CPU; first the edits of `compare`'s `edited`, then those of `fixed`."""

    nll_clean: Float[Tensor, " rows"]  # nats
    nll: Float[Tensor, "edit rows"]
    kl: Float[Tensor, "edit rows"]  # KL(clean || edited), at least 0


def compare(
    clean: Float[Tensor, "rows width"],
    edited: Sequence[Float[Tensor, "rows width"]],
    head: Head,
    targets: Int[Tensor, " rows"],
    *,
    fixed: Fixed | None = None,
    positions: Int[Tensor, " rows"] | None = None,
) -> Compared:
    """Cross-entropy of clean and edited predictions of `targets`, and KL(clean || edited), for each row.

    Args:
        clean, edited: rows that `head` makes logits from.
        fixed: edits whose logits are known for each position, and `positions` of the rows, in ascending order.
    """
    n_edits = len(edited) + (0 if fixed is None else len(fixed.logsumexp))
    if len(clean) == 0:
        none = torch.zeros(n_edits, 0, dtype=torch.float64)
        return Compared(none.sum(dim=0), none, none)
    parts = []
    for start in range(0, len(clean), ROWS):
        rows = slice(start, start + ROWS)
        where = None if positions is None else positions[rows]
        parts.append(_compare(clean[rows], [part[rows] for part in edited], head, targets[rows], fixed, where))
    return Compared(*(torch.cat(part, dim=-1) for part in zip(*parts, strict=True)))


def _compare(
    clean: Tensor,
    edited: Sequence[Tensor],
    head: Head,
    targets: Tensor,
    fixed: Fixed | None,
    positions: Tensor | None,
) -> Compared:
    n_rows, n_fixed = len(clean), 0 if fixed is None else len(fixed.logsumexp)
    precise = _precise(clean)
    targets = targets.to(clean.device)
    like = {"dtype": precise, "device": clean.device}
    # Of each tile: logsumexp of a and each b; and means under the tile's softmax(a), of a, each b and each fixed b.
    sums = torch.zeros(1 + len(edited), head.n_tiles, n_rows, **like)
    means = torch.zeros(1 + len(edited) + n_fixed, head.n_tiles, n_rows, **like)
    of_target = torch.zeros(1 + len(edited) + n_fixed, n_rows, **like)
    counts, where_fixed = [], torch.zeros(0)
    if fixed is not None:
        assert positions is not None, "fixed predictions are those of positions"
        places, counts = (part.tolist() for part in torch.unique_consecutive(positions, return_counts=True))
        where_fixed = positions.to(clean.device)
    for index in range(head.n_tiles):
        first = index * head.tile_size
        logits = head.tile(clean, index)
        rows = ((targets >= first) & (targets < first + logits.shape[1])).nonzero()[:, 0]
        columns = targets[rows] - first
        of_target[0, rows] = logits[rows, columns].to(precise)
        probs, highest, sums[0, index] = _softmax(logits)
        means[0, index] = highest + torch.linalg.vecdot(logits, probs)
        for number, final in enumerate(edited, 1):
            changed = head.tile(final, index)
            of_target[number, rows] = changed[rows, columns].to(precise)
            _, highest, sums[number, index] = _softmax(changed)
            means[number, index] = highest + torch.linalg.vecdot(changed, probs)
        if fixed is not None:
            tile = fixed.tiles[index]
            parts = [tile[place] @ part.T for place, part in zip(places, probs.split(counts), strict=True)]
            means[1 + len(edited) :, index] = torch.cat(parts, dim=1)
            of_target[1 + len(edited) :, rows] = tile[where_fixed[rows], :, columns].T.to(precise)
    logsumexp = sums.logsumexp(dim=1)
    if fixed is not None:
        logsumexp = torch.cat([logsumexp, fixed.logsumexp.to(**like)[:, where_fixed]])
    expected = (means * (sums[0] - logsumexp[0]).exp()).sum(dim=1)
    nll = (logsumexp - of_target).cpu().double()
    kl = (expected[0] - logsumexp[0] - (expected[1:] - logsumexp[1:])).cpu().double()
    # Rounding, not a negative divergence, takes it below 0.
    return Compared(nll[0], nll[1:], kl.clamp_min(0.0))


def _softmax(
    logits: Float[Tensor, "rows _"],
) -> tuple[Float[Tensor, "rows _"], Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Softmax of a tile, its largest logit, and its logsumexp from that logit's probability: torch's softmax is faster
    than exponentials by themselves. The largest logit is subtracted from `logits`, so that what is large and common to
    all of them costs the sums no digits.
    """
    precise = _precise(logits)
    highest = logits.amax(dim=1)
    probs = logits.sub_(highest[:, None]).softmax(dim=1)
    highest = highest.to(precise)
    return probs, highest, highest - probs.amax(dim=1).to(precise).log()


def _precise(like: Tensor) -> torch.dtype:
    return torch.float32 if like.device.type == "mps" else torch.float64  # Apple's GPUs have no float64


def fix(finals: Sequence[Float[Tensor, "pos width"]], head: Head) -> Fixed:
    """What `compare` needs of edits whose predictions depend on the position alone."""
    tiles = [torch.stack([head.tile(final, index) for final in finals], dim=1) for index in range(head.n_tiles)]
    # Any shift of a position's logits leaves its predictions as they are; large common offsets would cost digits.
    highest = torch.stack([tile.amax(dim=2) for tile in tiles]).amax(dim=0)[:, :, None]
    parts = [_softmax(tile.sub_(highest).flatten(0, 1).clone())[2].view(tile.shape[:2]) for tile in tiles]
    return Fixed(tiles, torch.stack(parts).logsumexp(dim=0).T)
