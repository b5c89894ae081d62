"""The contexts of a shard through the model: its rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.data.contexts import Context
from mechint.data.norms import first_not_finite, norm_histograms, row_norms
from mechint.errors import MechintError
from mechint.models.matmul import FastLinear


@dataclass(frozen=True)
class WindowRows:
    """Rows in the order of the contexts, and of the positions within each; `n_tokens` went through the model.

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
    contexts: Sequence[Context],
    *,
    batch_size: int,
    on_batch: Callable[[int, int], None] = lambda contexts, tokens: None,
) -> WindowRows:
    """Run the contexts through the model, like lengths together, and put their kept rows back into order.

    Contexts are padded on the right to the longest of their batch; a causal model's other positions do not see it.

    Args:
        on_batch: called with the contexts and tokens of each batch that is done.

    Raises:
        MechintError: the model gave NaN or Inf.
    """
    kept = [torch.tensor(context.kept, dtype=torch.bool) for context in contexts]
    starts = [0]
    for mask in kept:
        starts.append(starts[-1] + int(mask.sum()))
    order = sorted(range(len(contexts)), key=lambda i: len(contexts[i].tokens))
    rows: Tensor = torch.empty(0, model.d_model)
    first_norms: list[Tensor] = []
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        padded = torch.zeros(len(batch), len(contexts[batch[-1]].tokens), dtype=torch.long)
        for line, i in enumerate(batch):
            padded[line, : len(contexts[i].tokens)] = torch.tensor(contexts[i].tokens)
        with FastLinear():
            values = model.activations(padded, hook_name)
        if not begin:
            rows = torch.empty(starts[-1], values.shape[-1], dtype=values.dtype)
        left_out = [line for line, i in enumerate(batch) if not contexts[i].kept[0]]
        if left_out:
            first_norms.append(row_norms(values[left_out, 0].cpu()))
        for line, i in enumerate(batch):
            rows[starts[i] : starts[i + 1]] = values[line, : len(kept[i])][kept[i]]
        on_batch(len(batch), sum(len(contexts[i].tokens) for i in batch))
    mask = torch.cat([*kept, torch.empty(0, dtype=torch.bool)])
    columns = [
        [token for context in contexts for token in context.tokens],
        [text_id for context in contexts for text_id in context.text_ids],
        [position for context in contexts for position in range(len(context.tokens))],
    ]
    tokens, text_ids, positions = (torch.tensor(column, dtype=torch.int32)[mask] for column in columns)
    result = WindowRows(
        activations=rows, tokens=tokens, text_ids=text_ids, positions=positions, norms={}, n_tokens=len(mask)
    )
    norms = row_norms(rows)
    bad = first_not_finite(rows, norms)
    if bad is not None:
        raise MechintError(
            f"{model.name} gave NaN or Inf at {hook_name} in text {int(result.text_ids[bad])}, first at"
            f" position {int(result.positions[bad])}; nothing of this shard was kept: use --dtype float32, or check the"
            " model's weights"
        )
    firsts = torch.cat([*first_norms, torch.empty(0)])
    firsts = firsts[firsts.isfinite()]
    at_start = torch.cat([result.positions == 0, torch.ones(len(firsts), dtype=torch.bool)])
    result.norms.update(norm_histograms(torch.cat([norms, firsts]), at_start))
    return result
