"""Decoder directions: how similar they are, neighbours, clusters and a map. Blocks bound the memory."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from mechint.errors import MechintError
from mechint.sae import SAE

# decoder_cosine_similarity refuses to make a larger matrix than this (8 GB in float32 is 46,000 latents).
MAX_SIMILARITY_BYTES = 8 * 2**30


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
