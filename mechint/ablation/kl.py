"""KL divergence of next-token distributions from a clean to a changed final residual, without forming either.

With D = (h_changed - h_clean) @ W_U, the change of the logits, and p the clean distribution,

    KL(clean || changed) = log E_p[exp D] - E_p[D] = log(1 + E_p[expm1 D]) - E_p[D].

A difference of two log-softmaxes rounds at the size of the logits (about 1e-6 in float32) whatever the effect; here
the rounding scales with D, so small effects keep their digits. Two things keep it so where all logits move together,
which costs nothing in KL but may be far larger than what does: D is shifted by its mean under p first (any shift leaves
the KL as it is), and both expectations are taken over the same rounded D, so that its error counts as the sum over
tokens of (q - p) * error (q: the changed distribution), which vanishes with the effect.

What is left is the error of h_changed itself. With `e` the error that it makes in the logits, by Cauchy and Schwarz and
sum (q - p)^2 / (q + p) <= 2 sum (sqrt q - sqrt p)^2 <= 2 KL,

    |sum (q - p) e| <= sqrt(2 KL * (E_p[e^2] + E_q[e^2])) = 2 * rms(e) * sqrt(KL).

`float32_limit` turns that into the largest KL that float32 may report within an error, given rms(e) as it is measured
on the clean texts (float32 against float64); what lies above is computed again in float64.

The change of the cross-entropy of a token y falls out of the same sums: log E_p[exp D] - D_y. Nothing cancels in it, so
it carries the error of D_y itself, about `e`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.eval.predictions import Unembedding
from mechint.models.matmul import linear

# KL of the model's own predictions to those of its parts put together up to which the two count as the same: rounding
# gives about 1e-9, another activation function or folded weights give 1e-3 and more.
SAME_MODEL_KL = 1e-6
# Vocabulary a tile: rows x tile stays in the cache between the product and the sums, and the allocator reuses it.
TILE = 4192
# Rows at once, for the same reason, and for float64 to bound rows x d_vocab.
ROWS = 1024
ROWS_FLOAT64 = 128
MAX_FLOAT32_KL = 0.01


class CleanPredictions(NamedTuple):
    """The clean next-token distributions at each position of a block of texts."""

    probs: list[Float[Tensor, "pos _"]]  # one tensor a tile of the vocabulary
    mean_unembed: Float[Tensor, "pos d_model"]  # E_p[W_U], so that E_p[D] = change @ E_p[W_U]


class Effect(NamedTuple):
    """What a change of the final residual does at each row: both in nats, float64 (on the CPU)."""

    kl: Float[Tensor, " *rows"]  # KL(clean || changed)
    ce_change: Float[Tensor, " *rows"]  # of the row's own next token; 0 where it has none


class ChangedHead(Unembedding):
    """What a change of the final residual does to the predictions; W_U in float32, in tiles of the vocabulary."""

    def __init__(self, weight: Float[Tensor, "d_vocab d_model"], bias: Float[Tensor, " d_vocab"] | None):
        self.weight = weight.detach().float().contiguous()
        self.bias = bias.detach() if bias is not None else None
        super().__init__(self.weight, self.bias, TILE)

    def log_probs(self, final: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Log-softmax of the logits in the precision (and on the device) of `final`."""
        logits = self._product(final)
        if self.bias is not None:
            logits += self.bias.to(final)
        return torch.log_softmax(logits, dim=-1)

    def clean(self, final: Float[Tensor, "pos d_model"]) -> CleanPredictions:
        """In float32: an error in p only weighs the tokens differently, by a part in a million."""
        parts = [self.log_probs(rows).exp_().split(TILE, dim=1) for rows in final.to(self.weight).split(ROWS_FLOAT64)]
        probs = [torch.cat(tile) for tile in zip(*parts, strict=True)]
        mean = torch.stack([p @ tile for p, tile in zip(probs, self.weights, strict=True)]).sum(0)
        return CleanPredictions(probs, mean)

    def effect(
        self,
        change: Float[Tensor, "rows d_model"],
        clean: CleanPredictions,
        position: Int[Tensor, " rows"],
        target: Int[Tensor, " rows"],
    ) -> Effect:
        """KL and change of the cross-entropy of each row; nan or inf where float32's exp overflows.

        `change` is h_changed - h_clean, `position` the row's place in `clean`, `target` its next token (-1: none). Rows
        that share a position are brought together, so that each distribution is read once for all of them.
        """
        order = torch.argsort(position, stable=True)
        change, sorted_position = change[order], position[order]
        sorted_target = target.to(order.device)[order]
        parts = [
            self._effect_sorted(rows, clean, where, tokens)
            for rows, where, tokens in zip(
                change.split(ROWS), sorted_position.split(ROWS), sorted_target.split(ROWS), strict=True
            )
        ]
        result = torch.empty(2, change.shape[0], dtype=torch.float64)
        result[:, order.cpu()] = torch.cat(parts, dim=1)
        return Effect(*result)

    def _effect_sorted(
        self, change: Tensor, clean: CleanPredictions, position: Tensor, target: Tensor
    ) -> Float[Tensor, "2 rows"]:
        where, counts = (part.tolist() for part in torch.unique_consecutive(position, return_counts=True))
        shift = (change * clean.mean_unembed[position]).sum(1, keepdim=True)
        grown = change.new_empty(len(self.weights), change.shape[0])  # sum over a tile of p * expm1(D)
        moved = torch.empty_like(grown)  # sum over a tile of p * D
        for index, (tile, probs) in enumerate(zip(self.weights, clean.probs, strict=True)):
            logits = linear(change, tile).sub_(shift)
            groups = [(rows, probs[place]) for rows, place in zip(logits.split(counts), where, strict=True)]
            torch.cat([rows @ p for rows, p in groups], out=moved[index])
            logits.expm1_()
            torch.cat([rows @ p for rows, p in groups], out=grown[index])
        of_target = (change * self.weight[target.clamp(min=0)]).sum(1) - shift[:, 0]
        # On the CPU, because Apple's GPUs have no float64.
        normaliser = torch.log1p(grown.cpu().double().sum(0))
        ce_change = (normaliser - of_target.cpu().double()).where(target.cpu() >= 0, 0.0)
        return torch.stack((normaliser - moved.cpu().double().sum(0), ce_change))

    def precise_effect(
        self,
        clean: Float[Tensor, "pos d_model"],
        changed: Float[Tensor, "rows d_model"],
        position: Int[Tensor, " rows"],
        target: Int[Tensor, " rows"],
    ) -> Effect:
        """As `effect`, from the residuals themselves, in their precision (and on their device)."""
        target = target.to(changed.device)
        result = torch.empty(2, changed.shape[0], dtype=changed.dtype, device=changed.device)
        order = torch.argsort(position, stable=True)
        for rows in order.split(ROWS_FLOAT64):
            where, back = torch.unique_consecutive(position[rows], return_inverse=True)
            log_p = self.log_probs(clean[where])[back]
            difference = self._product(changed[rows] - clean[position[rows]])
            normaliser = torch.logsumexp(log_p + difference, dim=-1)
            of_target = difference.gather(1, target[rows].clamp(min=0)[:, None])[:, 0]
            result[0, rows] = normaliser - (log_p.exp() * difference).sum(-1)
            result[1, rows] = (normaliser - of_target).where(target[rows] >= 0, 0.0)
        return Effect(*result)

    def logit_error(self, error: Float[Tensor, "pos d_model"], clean: CleanPredictions) -> float:
        """The largest, over positions, root mean square under p of what an error of the residual does to the logits."""
        shift = (error * clean.mean_unembed).sum(1, keepdim=True)
        square = torch.zeros_like(shift[:, 0])
        for tile, probs in zip(self.weights, clean.probs, strict=True):
            for here in torch.arange(error.shape[0], device=error.device).split(ROWS):
                square[here] += (linear(error[here], tile).sub_(shift[here]).square_() * probs[here]).sum(1)
        return float(square.max().sqrt())

    def _product(self, rows: Tensor) -> Tensor:
        """`rows @ W_U` in the precision of `rows`; W_U is cast a tile at a time."""
        logits = rows.new_empty(rows.shape[0], self.weight.shape[0])
        for tile, columns in zip(self.weights, logits.split(TILE, dim=1), strict=True):
            columns.copy_(linear(rows, tile.to(rows)))
        return logits


def kl_of_log_probs(
    clean: Float[Tensor, "rows d_vocab"], changed: Float[Tensor, "rows d_vocab"]
) -> Float[Tensor, " rows"]:
    """KL(clean || changed) per row, in the delta form, in float64. Either may be logits: constants cancel."""
    nothing = torch.full((clean.shape[0],), -1, dtype=torch.int64)
    return effect_of_log_probs(clean, changed, nothing).kl


def effect_of_log_probs(
    clean: Float[Tensor, "rows d_vocab"], changed: Float[Tensor, "rows d_vocab"], target: Int[Tensor, " rows"]
) -> Effect:
    """KL(clean || changed) and the change of the cross-entropy of `target` (-1: none), as in `kl_of_log_probs`."""
    if clean.device.type == "mps":  # no float64 there
        clean, changed = clean.cpu(), changed.cpu()
    target = target.to(clean.device)
    log_p = torch.log_softmax(clean.double(), dim=-1)
    difference = changed.double() - clean.double()
    normaliser = torch.logsumexp(log_p + difference, dim=-1)
    of_target = difference.gather(1, target.clamp(min=0)[:, None])[:, 0]
    ce_change = (normaliser - of_target).where(target >= 0, 0.0)
    return Effect(normaliser - (log_p.exp() * difference).sum(-1), ce_change)


def float32_limit(logit_error: float, tolerance: float) -> float:
    """The largest KL that logits with this rms error give within `tolerance`; see the module's docstring."""
    return min(MAX_FLOAT32_KL, (tolerance / max(2 * logit_error, 1e-30)) ** 2)
