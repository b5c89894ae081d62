"""KL divergence of next-token distributions from a clean to a changed final residual, without forming either.

With D = (h_changed - h_clean) @ W_U, the change of the logits, and p the clean distribution,

    KL(clean || changed) = log E_p[exp D] - E_p[D] = log(1 + E_p[expm1 D]) - E_p[D].

A difference of two log-softmaxes rounds at the size of the logits (about 1e-6 in float32) whatever the effect; here
the rounding scales with D, so small effects keep their digits. Both expectations are taken over the same rounded D, so
its error counts as the sum over tokens of (q - p) * error (q: the changed distribution) and vanishes with the effect.

What is left is the error of h_changed itself. By Pinsker's inequality (sum |q - p| <= sqrt(2 KL)) an error of at most
`delta` in any logit changes the KL by at most delta * sqrt(2 KL) to first order. `float32_limit` turns that into the
largest KL that float32 may report within an error; what lies above is computed again in float64.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.models.matmul import linear

# Vocabulary a tile: rows x tile stays in the cache between the product and the sums, and the allocator reuses it.
TILE = 4192
# Rows at once, for the same reason, and for float64 to bound rows x d_vocab.
ROWS = 1024
ROWS_FLOAT64 = 128
MAX_FLOAT32_KL = 0.01


class Unembedding:
    """W_U as [d_vocab, d_model] in float32, in tiles of the vocabulary."""

    def __init__(self, weight: Float[Tensor, "d_vocab d_model"], bias: Float[Tensor, " d_vocab"] | None):
        self.weight = weight.detach().float().contiguous()
        self.bias = bias.detach().double() if bias is not None else None
        self.tiles = self.weight.split(TILE)

    def log_probs(self, final: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_vocab"]:
        """Log-softmax of the logits in the precision (and on the device) of `final`."""
        logits = self._product(final)
        if self.bias is not None:
            logits += self.bias.to(final)
        return torch.log_softmax(logits, dim=-1)

    def probs(self, final: Float[Tensor, "pos d_model"]) -> list[Float[Tensor, "pos _"]]:
        """Clean distributions, computed in the precision of `final` and kept in float32, one tensor a tile."""
        parts = [self.log_probs(rows).exp().to(self.weight).split(TILE, dim=1) for rows in final.split(ROWS_FLOAT64)]
        return [torch.cat(tile) for tile in zip(*parts, strict=True)]

    def kl(
        self,
        change: Float[Tensor, "rows d_model"],
        probs: list[Float[Tensor, "pos _"]],
        position: Int[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """KL(clean || changed) of each row in float64 from float32 products; nan or inf where exp overflows.

        `change` is h_changed - h_clean, `position` the row's place in `probs`. Rows that share a position are brought
        together, so that each distribution is read once for all of them.
        """
        order = torch.argsort(position, stable=True)
        change, sorted_position = change[order], position[order]
        result = torch.empty(change.shape[0], dtype=torch.float64, device=order.device)
        for begin in range(0, change.shape[0], ROWS):
            here = slice(begin, begin + ROWS)
            result[order[here]] = self._kl_sorted(change[here], probs, sorted_position[here])
        return result

    def _kl_sorted(self, change: Tensor, probs: list[Tensor], position: Tensor) -> Tensor:
        where, counts = (part.tolist() for part in torch.unique_consecutive(position, return_counts=True))
        n_tiles = len(self.tiles)
        grown = change.new_empty(n_tiles, change.shape[0])  # sum over a tile of p * expm1(D)
        moved = change.new_empty(n_tiles, change.shape[0])  # sum over a tile of p * D
        for index, (tile, clean) in enumerate(zip(self.tiles, probs, strict=True)):
            logits = linear(change, tile)
            groups = [(rows, clean[place]) for rows, place in zip(logits.split(counts), where, strict=True)]
            torch.cat([rows @ p for rows, p in groups], out=moved[index])
            logits.expm1_()
            torch.cat([rows @ p for rows, p in groups], out=grown[index])
        return torch.log1p(grown.double().sum(0)) - moved.double().sum(0)

    def precise_kl(
        self,
        clean: Float[Tensor, "pos d_model"],
        changed: Float[Tensor, "rows d_model"],
        position: Int[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """As `kl`, from the residuals themselves, in their precision, safe from overflow whatever the change."""
        result = torch.empty(changed.shape[0], dtype=changed.dtype, device=changed.device)
        order = torch.argsort(position, stable=True)
        for rows in order.split(ROWS_FLOAT64):
            where, back = torch.unique_consecutive(position[rows], return_inverse=True)
            log_p = self.log_probs(clean[where])[back]
            difference = self._product(changed[rows] - clean[position[rows]])
            result[rows] = torch.logsumexp(log_p + difference, dim=-1) - (log_p.exp() * difference).sum(-1)
        return result

    def largest_logit_error(self, error: Float[Tensor, "rows d_model"], probs: list[Float[Tensor, "rows _"]]) -> float:
        """max |D - E_p[D]| over rows and tokens, for an error of the final residual."""
        worst = 0.0
        for begin in range(0, error.shape[0], ROWS):
            here = slice(begin, begin + ROWS)
            parts = [linear(error[here], tile) for tile in self.tiles]
            mean = torch.stack([(part * p[here]).sum(1) for part, p in zip(parts, probs, strict=True)]).sum(0)
            worst = max(worst, *(float((part - mean.unsqueeze(1)).abs().max()) for part in parts))
        return worst

    def _product(self, rows: Tensor) -> Tensor:
        """`rows @ W_U` in the precision of `rows`; W_U is cast a tile at a time."""
        logits = rows.new_empty(rows.shape[0], self.weight.shape[0])
        for tile, columns in zip(self.tiles, logits.split(TILE, dim=1), strict=True):
            columns.copy_(rows @ tile.to(rows).T)
        return logits


def kl_of_log_probs(
    clean: Float[Tensor, "rows d_vocab"], changed: Float[Tensor, "rows d_vocab"]
) -> Float[Tensor, " rows"]:
    """KL(clean || changed) per row, in the delta form, in float64. Either may be logits: constants cancel."""
    log_p = torch.log_softmax(clean.double(), dim=-1)
    difference = changed.double() - clean.double()
    return torch.logsumexp(log_p + difference, dim=-1) - (log_p.exp() * difference).sum(-1)


def float32_limit(logit_error: float, tolerance: float) -> float:
    """The largest KL that logits with errors up to `logit_error` give within `tolerance`; see above."""
    return min(MAX_FLOAT32_KL, 0.5 * (tolerance / max(logit_error, 1e-30)) ** 2)
