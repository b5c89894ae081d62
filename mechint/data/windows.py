"""One window of texts through the model: the rows of a shard."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.data.norms import first_not_finite, norm_histograms, row_norms
from mechint.errors import MechintError
from mechint.models.matmul import FastLinear


@dataclass(frozen=True)
class WindowRows:
    """Rows in the order of the texts, and of the positions within each; `n_tokens` went through the model.

    `norms` are histograms of the rows and of those left out at position 0.
    """

    activations: Float[Tensor, "n d_in"]
    tokens: Int[Tensor, " n"]
    text_ids: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    norms: dict[str, Any]
    n_tokens: int


def window_rows(
    model: Any,
    hook_name: str,
    token_lists: Sequence[Sequence[int]],
    text_ids: Sequence[int],
    *,
    drop_first: bool,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda texts, tokens: None,
) -> WindowRows:
    """Run the texts through the model, like lengths together, and put the rows back into the order of the texts.

    Texts are padded on the right to the longest of their batch; a causal model's other positions do not see it.

    Args:
        drop_first: leave position 0 of each text (its BOS) out.
        on_batch: called with the texts and tokens of each batch that is done.

    Raises:
        MechintError: the model gave NaN or Inf.
    """
    skipped = 1 if drop_first else 0
    counts = [max(len(tokens) - skipped, 0) for tokens in token_lists]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    order = sorted((i for i, tokens in enumerate(token_lists) if tokens), key=lambda i: len(token_lists[i]))
    rows: Tensor = torch.empty(0, model.d_model)
    first_norms: list[Tensor] = []
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        padded = torch.zeros(len(batch), len(token_lists[batch[-1]]), dtype=torch.long)
        for line, i in enumerate(batch):
            padded[line, : len(token_lists[i])] = torch.tensor(token_lists[i])
        with FastLinear():
            values = model.activations(padded, hook_name)
        if not begin:
            rows = torch.empty(starts[-1], values.shape[-1], dtype=values.dtype)
        if drop_first:
            first_norms.append(row_norms(values[:, 0].cpu()))
        for line, i in enumerate(batch):
            rows[starts[i] : starts[i + 1]] = values[line, skipped : len(token_lists[i])]
        on_batch(len(batch), sum(len(token_lists[i]) for i in batch))
    positions = [torch.arange(skipped, skipped + count, dtype=torch.int32) for count in counts]
    flat_tokens = [token for tokens in token_lists for token in tokens[skipped:]]
    result = WindowRows(
        activations=rows,
        tokens=torch.tensor(flat_tokens, dtype=torch.int32),
        text_ids=torch.tensor(text_ids, dtype=torch.int32).repeat_interleave(torch.tensor(counts)),
        positions=torch.cat(positions) if positions else torch.empty(0, dtype=torch.int32),
        norms={},
        n_tokens=sum(map(len, token_lists)),
    )
    norms = row_norms(rows)
    bad = first_not_finite(rows, norms)
    if bad is not None:
        raise MechintError(
            f"{model.name} gave NaN or Inf at {hook_name} in text {int(result.text_ids[bad])}, first at"
            f" position {int(result.positions[bad])}; nothing of this shard was kept: use --dtype float32, or check the"
            " model's weights"
        )
    left_out = torch.cat(first_norms) if first_norms else torch.empty(0)
    left_out = left_out[left_out.isfinite()]
    at_start = torch.cat([result.positions == 0, torch.ones(len(left_out), dtype=torch.bool)])
    result.norms.update(norm_histograms(torch.cat([norms, left_out]), at_start))
    return result
