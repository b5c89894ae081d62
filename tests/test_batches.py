"""Splits and batch streams: who is held out and what a step sees follow from the seed alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechint.data.batches import CounterBatches, TorchBatches, split_indices
from mechint.errors import MechintError


class Table:
    """What a split looks at: the number of rows and each row's text. Row i holds the number i."""

    def __init__(self, text_ids: torch.Tensor | None, n_rows: int):
        self.text_ids, self.n_rows = text_ids, n_rows

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return indices.float()[:, None]


def table(text_lengths: list[int]) -> Table:
    ids = torch.repeat_interleave(torch.arange(len(text_lengths)), torch.tensor(text_lengths))
    return Table(ids, len(ids))


@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=40),
    st.floats(0.01, 0.6),
    st.integers(0, 2**31),
)
def test_split_by_text_never_cuts_a_text(lengths: list[int], fraction: float, seed: int):
    rows = table(lengths)
    train, val = split_indices(rows, fraction, seed, "text")
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(rows.n_rows))
    assert not set(rows.text_ids[train].tolist()) & set(rows.text_ids[val].tolist())
    assert len(set(rows.text_ids[val].tolist())) == max(1, int(len(lengths) * fraction))
    again = split_indices(rows, fraction, seed, "text")
    assert torch.equal(again[1], val)


def test_splits_that_cannot_be():
    with pytest.raises(MechintError, match="leaves nothing to train on"):
        split_indices(table([5]), 0.5, 0, "text")
    with pytest.raises(MechintError, match="--split-by row"):
        split_indices(Table(None, 10), 0.5, 0, "text")
    train, val = split_indices(table([5, 5]), 0.0, 0, "text")
    assert (len(train), len(val)) == (10, 0)


def test_counter_batches_depend_on_seed_and_step_alone():
    pool = torch.arange(100, 200)
    stream = CounterBatches(pool, 64, seed=5)
    late = stream.indices(999)
    assert torch.equal(late, CounterBatches(pool, 64, seed=5).indices(999))
    assert torch.equal(stream.indices(0), CounterBatches(pool, 64, seed=5).indices(0))
    for other in (CounterBatches(pool, 64, seed=6).indices(999), stream.indices(998)):
        assert not torch.equal(late, other)
    assert late.min() >= 100 and late.max() < 200 and torch.equal(late, late.sort().values)


def test_counter_batches_are_uniform():
    stream = CounterBatches(torch.arange(50), 500, seed=0)
    counts = np.bincount(np.concatenate([stream.indices(step).numpy() for step in range(200)]), minlength=50)
    # chi-squared with 49 degrees of freedom: above 100 has probability 3e-5 for uniform draws
    assert ((counts - 2000) ** 2 / 2000).sum() < 100


def test_counter_stream_is_pinned():
    """Resuming an old run with a new version must see the same batches; these came from Philox4x64-10."""
    assert CounterBatches(torch.arange(1000), 6, seed=42).indices(7).tolist() == [151, 211, 483, 578, 705, 937]


def test_torch_batches_are_the_sequential_stream():
    pool = torch.arange(1000)
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randint(0, 1000, (16,), generator=generator) for _ in range(6)]
    stream = TorchBatches(pool, 16, seed=3)
    assert all(torch.equal(stream.indices(step), expected[step]) for step in range(3))
    resumed = TorchBatches(pool, 16, seed=3)
    assert torch.equal(resumed.indices(5), expected[5])
    assert torch.equal(resumed.indices(2), expected[2]), "an earlier step starts over"
