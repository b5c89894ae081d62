"""Cross-entropy and KL of next-token predictions, in one pass over tiles of the vocabulary.

For a position with clean logits a and changed logits b, with p = softmax(a),

    cross-entropy  logsumexp(a) - a[target]
    KL(clean || changed) = E_p[a] - E_p[b] - logsumexp(a) + logsumexp(b).

logsumexp and the two expectations are sums over the vocabulary, so a tile of logits is made, summed up and forgotten
while it is in the processor's cache (the running maximum is that of Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax"). The whole [positions, d_vocab] matrices never exist, and no log-softmax is written out.
Logits and exponentials are float32, their sums over tiles float64.
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

    def __init__(self, weight: Float[Tensor, "d_vocab d_model"], bias: Float[Tensor, " d_vocab"] | None):
        self.tile_size = TILE
        self.weights = weight.split(TILE)
        self.biases = [None] * len(self.weights) if bias is None else list(bias.split(TILE))
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

    tiles: list[Float[Tensor, "pos _ edit"]]
    logsumexp: Float[Tensor, "edit pos"]  # float64


class Compared(NamedTuple):
    """Per position, in float64 on the CPU; first the edits of `compare`'s `edited`, then those of `fixed`."""

    nll_clean: Float[Tensor, " rows"]  # nats
    nll: Float[Tensor, "edit rows"]
    kl: Float[Tensor, "edit rows"]  # KL(clean || edited), at least 0


class _Running:
    """logsumexp of the rows of logits that come a tile at a time, and the logit of each row's target."""

    def __init__(self, n_rows: int, like: Tensor, precise: torch.dtype):
        self.highest = torch.full((n_rows, 1), -torch.inf, dtype=torch.float32, device=like.device)
        self.total = torch.zeros(n_rows, 1, dtype=precise, device=like.device)
        self.target = torch.zeros(n_rows, dtype=precise, device=like.device)

    def add(self, logits: Tensor, where: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The exponentials of a tile against the running maximum, and what sums made so far are to be scaled by."""
        highest = torch.maximum(self.highest, logits.amax(dim=1, keepdim=True))
        # -inf - -inf: nothing was summed so far
        scale = torch.exp(self.highest - highest).nan_to_num_(nan=1.0).to(self.total.dtype)
        exps = torch.exp(logits - highest)
        self.total = self.total * scale + exps.sum(dim=1, keepdim=True).to(self.total.dtype)
        self.highest = highest
        self.target[where] = logits[where, target].to(self.target.dtype)
        return exps, scale

    def logsumexp(self) -> Tensor:
        return (self.total.log() + self.highest.to(self.total.dtype))[:, 0]


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
    n_fixed = 0 if fixed is None else len(fixed.logsumexp)
    parts = []
    for start in range(0, len(clean), ROWS):
        rows = slice(start, start + ROWS)
        where = None if positions is None else positions[rows]
        parts.append(_compare(clean[rows], [part[rows] for part in edited], head, targets[rows], fixed, where))
    if not parts:
        none = torch.zeros(len(edited) + n_fixed, 0, dtype=torch.float64)
        return Compared(torch.zeros(0, dtype=torch.float64), none, none)
    return Compared(*(torch.cat(part, dim=-1) for part in zip(*parts, strict=True)))


def _compare(
    clean: Tensor,
    edited: Sequence[Tensor],
    head: Head,
    targets: Tensor,
    fixed: Fixed | None,
    positions: Tensor | None,
) -> Compared:
    n_rows, device = len(clean), clean.device
    precise = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    targets = targets.to(device)
    running = [_Running(n_rows, clean, precise) for _ in range(1 + len(edited))]
    n_fixed = 0 if fixed is None else len(fixed.logsumexp)
    # Sums over the vocabulary of exp(a - max a) times a, times each b, times each fixed b.
    weighted = torch.zeros(1 + len(edited) + n_fixed, n_rows, dtype=precise, device=device)
    groups: list[tuple[int, int]] = []
    target_fixed = torch.zeros(n_fixed, n_rows, dtype=precise, device=device)
    if fixed is not None:
        assert positions is not None
        found, counts = torch.unique_consecutive(positions, return_counts=True)
        groups = list(zip(found.tolist(), counts.tolist(), strict=True))
        positions = positions.to(device)
    for index in range(head.n_tiles):
        first = index * head.tile_size
        logits = head.tile(clean, index)
        where = ((targets >= first) & (targets < first + logits.shape[1])).nonzero()[:, 0]
        target = targets[where] - first
        exps, scale = running[0].add(logits, where, target)
        weighted *= scale[:, 0]
        weighted[0] += logits.mul_(exps).sum(dim=1).to(precise)
        for number, final in enumerate(edited, 1):
            changed = head.tile(final, index)
            running[number].add(changed, where, target)
            weighted[number] += changed.mul_(exps).sum(dim=1).to(precise)
        if fixed is not None:
            tile = fixed.tiles[index]
            sums = [part @ tile[where_] for part, (where_, _) in _by_position(exps, groups)]
            weighted[1 + len(edited) :] += torch.cat(sums).T.to(precise)
            assert positions is not None
            target_fixed[:, where] = tile[positions[where], target].T.to(precise)
    logsumexp = running[0].logsumexp()
    expected = weighted / running[0].total[:, 0]
    nll = [one.logsumexp() - one.target for one in running]
    kl = [expected[0] - expected[number] - logsumexp + one.logsumexp() for number, one in enumerate(running[1:], 1)]
    if fixed is not None:
        assert positions is not None
        of_fixed = fixed.logsumexp.to(device, precise)[:, positions]
        nll += list(of_fixed - target_fixed)
        kl += list(expected[0] - expected[1 + len(edited) :] - logsumexp + of_fixed)
    shape = (-1, n_rows)
    stacked_nll = torch.stack(nll).cpu().double()
    stacked_kl = torch.stack(kl).cpu().double() if kl else torch.zeros(0, n_rows, dtype=torch.float64)
    # Rounding, not a negative divergence, takes it below 0.
    return Compared(stacked_nll[0], stacked_nll[1:].reshape(shape), stacked_kl.clamp_min(0.0))


def _by_position(rows: Tensor, groups: list[tuple[int, int]]):  # noqa: ANN202
    return zip(rows.split([count for _, count in groups]), groups, strict=True)


def fix(finals: Sequence[Float[Tensor, "pos width"]], head: Head) -> Fixed:
    """What `compare` needs of edits whose predictions depend on the position alone."""
    tiles = [torch.stack([head.tile(final, index) for final in finals], dim=2) for index in range(head.n_tiles)]
    precise = torch.float32 if finals[0].device.type == "mps" else torch.float64
    parts = torch.stack([tile.logsumexp(dim=1).to(precise) for tile in tiles])  # [tile, pos, edit]
    return Fixed(tiles, parts.logsumexp(dim=0).T)
