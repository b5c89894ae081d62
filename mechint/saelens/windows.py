"""Windows of tokens from texts, and mixed batches of rows from their activations, by SAELens's rules."""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor


def token_windows(
    sequences: Iterable[list[int]],
    context_size: int,
    *,
    bos: int | None,
    separator: int | None,
    concat: bool = True,
) -> Iterator[list[int]]:
    """Windows of exactly `context_size` tokens; what is left at the end is dropped.

    Args:
        bos: begins each window; None for no BOS.
        separator: stands between two texts of a window; None for nothing.
        concat: False takes one window from each text that is long enough.
    """
    if not concat:
        for tokens in sequences:
            row = tokens if bos is None or tokens[:1] == [bos] else [bos, *tokens]
            if len(row) >= context_size:
                yield row[:context_size]
        return
    window: list[int] = []
    for tokens in sequences:
        start = 0
        while start < len(tokens):
            if not window and bos is not None and tokens[start] != bos:
                window = [bos]
            elif window and separator is not None and tokens[start] != separator:
                window.append(separator)
            taken = context_size - len(window)
            window += tokens[start : start + taken]
            start += taken
            if len(window) == context_size:
                yield window
                window = []


def mixed(
    parts: Iterator[Float[Tensor, "n d_in"]], buffer_size: int, batch_size: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Batches from a buffer of rows: filled, shuffled, and served down to half before it is filled again, so that a
    batch holds rows of many texts. The rest is served when the parts end; a last short batch is dropped."""
    buffer: list[Tensor] = []
    held = 0
    for part in parts:
        buffer.append(part)
        held += len(part)
        if held < max(buffer_size, 2 * batch_size):
            continue
        rows = torch.cat(buffer)
        rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        served = 0
        while len(rows) - served > max(buffer_size // 2, batch_size):
            yield rows[served : served + batch_size]
            served += batch_size
        buffer, held = [rows[served:]], len(rows) - served
    if buffer:
        rows = torch.cat(buffer)
        rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield rows[start : start + batch_size]
