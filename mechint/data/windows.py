"""A block of consecutive texts through the model: the rows of a shard, at one hook or several.

Three steps, which collection runs on three threads: `plan_block` (batches, columns), `run_block` (the model) and
`WindowRows.checked_norms`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.data.contexts import Context
from mechint.data.norms import LARGEST_NORM, first_not_finite, norm_histograms, row_norms
from mechint.errors import MechintError
from mechint.models.matmul import FastLinear

# Tokens of a batch, padding counted. A processor is busy with a few texts and does best while what it works on stays
# in its caches; a GPU needs more to be busy at all.
BATCH_TOKENS = {"cpu": 4096, "cuda": 32_768}


@dataclass(frozen=True)
class TokenBatch:
    """Contexts padded on the right. `runs`: (line, start, stop, row) says that positions `start` to `stop` of a line
    are rows `row` onwards of the block; `left_out`: lines whose position 0 has no row."""

    tokens: Int[Tensor, "batch pos"]
    runs: list[tuple[int, int, int, int]]
    left_out: list[int]
    n_tokens: int

    @property
    def n_contexts(self) -> int:
        return len(self.tokens)

    @property
    def left_out_lines(self) -> slice | list[int]:
        """For indexing; usually it is all lines or none, and a slice costs a GPU no copy of numbers."""
        if len(self.left_out) in (0, self.n_contexts):
            return slice(len(self.left_out))
        return self.left_out


@dataclass(frozen=True)
class Block:
    """What the model is to read, and of which token each row will be: in the order of the contexts, and of the
    positions within each."""

    batches: list[TokenBatch]
    tokens: Int[Tensor, " n"]
    text_ids: Int[Tensor, " n"]
    positions: Int[Tensor, " n"]
    n_tokens: int

    @property
    def n_rows(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class WindowRows:
    """The rows of a block, by hook, and the vectors at positions 0 that have no row."""

    model_name: str
    block: Block
    activations: dict[str, Float[Tensor, "n d_in"]]
    left_out: dict[str, Float[Tensor, "n_left d_in"]]
    arrived: Any = None  # the CUDA event behind the last copy to the host

    def checked_norms(self, hook_name: str) -> Float[Tensor, " n"]:
        """Wait until the rows at this hook have arrived; their norms. Raises `MechintError` if one is NaN or Inf."""
        if self.arrived is not None:
            self.arrived.synchronize()
        rows, block = self.activations[hook_name], self.block
        norms = row_norms(rows)
        bad = first_not_finite(rows, norms)
        if bad is not None:
            raise MechintError(
                f"{self.model_name} gave NaN or Inf at {hook_name} in text {int(block.text_ids[bad])}, first at"
                f" position {int(block.positions[bad])}; nothing of this shard was kept: use --dtype float32, or check"
                " the model's weights"
            )
        return norms.clamp_max(LARGEST_NORM)

    def histograms(self, hook_name: str, norms: Float[Tensor, " n"]) -> dict[str, Any]:
        """Of the rows' norms, and of those left out at position 0."""
        left_out = row_norms(self.left_out[hook_name])
        left_out = left_out[left_out.isfinite()]
        at_start = torch.cat([self.block.positions == 0, torch.ones(len(left_out), dtype=torch.bool)])
        return norm_histograms(torch.cat([norms, left_out]), at_start)


def plan_block(
    contexts: Sequence[Context], *, batch_size: int | None = None, device: str | torch.device = "cpu"
) -> Block:
    """Batches of like lengths for a model on `device`: `batch_size` contexts each, or `BATCH_TOKENS` if not given."""
    cuda = torch.device(device).type == "cuda"
    lengths = np.array([len(context.tokens) for context in contexts], dtype=np.int64)
    starts = lengths.cumsum() - lengths
    tokens, text_ids = (
        np.fromiter(itertools.chain.from_iterable(lists), np.int32, lengths.sum())
        for lists in ((context.tokens for context in contexts), (context.text_ids for context in contexts))
    )
    kept = np.fromiter(itertools.chain.from_iterable(context.kept for context in contexts), np.bool_, lengths.sum())
    rows_before = kept.cumsum() - kept
    batches = []
    for numbers in _alike(lengths, batch_size, BATCH_TOKENS["cuda" if cuda else "cpu"]):
        # from pinned memory a copy to the GPU need not be waited for
        padded = torch.zeros(len(numbers), int(lengths[numbers[-1]]), dtype=torch.long, pin_memory=cuda)
        runs, left_out = [], []
        for line, number in enumerate(numbers):
            start, n = starts[number], lengths[number]
            padded[line, :n] = torch.from_numpy(tokens[start : start + n])
            edges = np.flatnonzero(np.diff(kept[start : start + n], prepend=False, append=False))
            runs += [(line, int(a), int(b), int(rows_before[start + a])) for a, b in edges.reshape(-1, 2)]
            if not kept[start]:
                left_out.append(line)
        batches.append(TokenBatch(padded, runs, left_out, int(lengths[numbers].sum())))
    positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(starts, lengths).astype(np.int32)
    columns = [torch.from_numpy(column[kept]) for column in (tokens, text_ids, positions)]
    return Block(batches, *columns, n_tokens=len(tokens))


def _alike(lengths: np.ndarray, batch_size: int | None, batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the contexts of each batch, shortest first; empty contexts are in none."""
    batch: list[int] = []
    for number in np.argsort(lengths, kind="stable").tolist():
        length = int(lengths[number])
        if not length:
            continue
        full = len(batch) == batch_size if batch_size else (len(batch) + 1) * length > batch_tokens
        if batch and full:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def run_block(
    model: Any,
    hook_names: Sequence[str],
    block: Block,
    *,
    device: str | torch.device = "cpu",
    on_batch: Callable[[int, int], None] = lambda contexts, tokens: None,
) -> WindowRows:
    """Run a block through the model; its rows lie on `device`. They may still be on their way: see `checked_norms`.

    Padding is on the right; a causal model's other positions do not see it.

    Args:
        on_batch: called with the contexts and tokens of each batch that is done.
    """
    to_host = torch.device(model.device).type == "cuda" and torch.device(device).type == "cpu"
    activations: dict[str, Tensor] = {}
    left_out: dict[str, Tensor] = {}
    n_left = 0
    for batch in block.batches:
        with FastLinear() if torch.device(model.device).type == "cpu" else contextlib.nullcontext():
            values = model.activations_at(batch.tokens, hook_names)
        for hook_name, value in values.items():
            if hook_name not in activations:
                like = {"dtype": value.dtype, "device": device, "pin_memory": to_host}
                activations[hook_name] = torch.empty(block.n_rows, value.shape[-1], **like)
                n_first = sum(len(other.left_out) for other in block.batches)
                left_out[hook_name] = torch.empty(n_first, value.shape[-1], **like)
            rows = activations[hook_name]
            for line, start, stop, row in batch.runs:
                rows[row : row + stop - start].copy_(value[line, start:stop], non_blocking=to_host)
            first = left_out[hook_name][n_left : n_left + len(batch.left_out)]
            first.copy_(value[batch.left_out_lines, 0], non_blocking=to_host)
        n_left += len(batch.left_out)
        on_batch(batch.n_contexts, batch.n_tokens)
    for hook_name in hook_names:
        if hook_name not in activations:  # not one token in all of these texts
            empty = torch.empty(0, model.hook_width(hook_name), dtype=model.hf_model.dtype, device=device)
            activations[hook_name] = left_out[hook_name] = empty
    arrived = torch.cuda.current_stream(model.device).record_event() if to_host else None
    return WindowRows(model.name, block, activations, left_out, arrived)
