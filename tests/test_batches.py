"""Splits and batch streams: who is held out and what a step sees follow from the seed alone."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechint.data.batches import ROUNDS, CounterBatches, ShuffledBatches, TorchBatches, permuted, split_indices
from mechint.errors import MechintError
from mechint.streams import BATCHES, EPOCHS, LIVE, PREFIXES, RESAMPLING, philox


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


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000, 4097])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_shuffled_batches_give_each_row_once_an_epoch(n: int, batch_size: int):
    pool = torch.arange(100, 100 + n)
    stream = ShuffledBatches(pool, batch_size, seed=5)
    steps = range(-(-3 * n // batch_size))
    seen = torch.cat([stream.indices(step) for step in steps])[: 3 * n] if batch_size == 1 else None
    if seen is not None:
        for epoch in seen.split(n):
            assert torch.equal(epoch.sort().values, pool)
    counts = torch.zeros(n, dtype=torch.int64)
    for step in steps:  # at any time no row was seen twice more than another
        batch = stream.indices(step)
        assert torch.equal(batch, batch.sort().values) and len(batch) == batch_size
        counts.index_add_(0, batch - 100, torch.ones(batch_size, dtype=torch.int64))
        # a batch that is larger than what is left of an epoch takes the rest from the next
        assert counts.max() - counts.min() <= 1 + ((step + 1) * batch_size % n != 0)
    assert int(counts.sum()) == len(steps) * batch_size


def test_shuffled_batches_depend_on_seed_and_step_alone():
    stream = ShuffledBatches(torch.arange(5000), 64, seed=5)
    late = stream.indices(999)
    assert torch.equal(late, ShuffledBatches(torch.arange(5000), 64, seed=5).indices(999))
    for other in (ShuffledBatches(torch.arange(5000), 64, seed=6).indices(999), stream.indices(998)):
        assert not torch.equal(late, other)


@pytest.mark.parametrize("n", [50, 1000, 4096])
def test_shuffled_order_is_like_a_random_one(n: int):
    """Where 400 epochs put a row, which follow which, and how one epoch's order goes with the next's."""
    orders = np.stack([permuted(np.arange(n), n, philox(7, EPOCHS, epoch).random_raw(ROUNDS)) for epoch in range(400)])
    places = np.argsort(orders, axis=1)
    blocks = 10
    table = np.zeros((blocks, blocks))
    np.add.at(table, (np.arange(n) * blocks // n, places * blocks // n), 1)
    expected = table.sum() / blocks**2
    # chi-squared with 81 degrees of freedom: above 140 has probability 5e-5
    assert ((table - expected) ** 2 / expected).sum() < 140
    steps = np.diff(orders, axis=1) % n - 1  # 0 .. n - 2, all as likely
    block = np.arange(n - 1) * blocks // (n - 1)
    expected = np.bincount(block) * steps.size / (n - 1)
    # 9 degrees of freedom: above 40 has probability 8e-6
    assert ((np.bincount(block[steps.ravel()]) - expected) ** 2 / expected).sum() < 40
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in itertools.pairwise(places)]
    assert abs(np.mean(correlations)) < 4 / np.sqrt(399 * n) and max(map(abs, correlations)) < 5 / np.sqrt(n)


def test_shuffled_stream_is_pinned():
    """A run resumed with a new version must see the same batches."""
    stream = ShuffledBatches(torch.arange(1000), 6, seed=42)
    assert stream.indices(7).tolist() == [176, 529, 561, 669, 811, 959]
    assert stream.indices(170).tolist() == [40, 93, 319, 444, 608, 706]


def test_streams_of_one_seed_have_nothing_in_common():
    """Not even moved against one another, as streams were whose number was the counter's low word."""
    drawn = {
        (stream, step): philox(42, stream, step).random_raw(500)
        for stream in (BATCHES, LIVE, PREFIXES, RESAMPLING, EPOCHS)
        for step in range(5)
    }
    assert len(np.unique(np.concatenate(list(drawn.values())))) == len(drawn) * 500


def test_torch_batches_are_the_sequential_stream():
    pool = torch.arange(1000)
    generator = torch.Generator().manual_seed(3)
    expected = [torch.randint(0, 1000, (16,), generator=generator) for _ in range(6)]
    stream = TorchBatches(pool, 16, seed=3)
    assert all(torch.equal(stream.indices(step), expected[step]) for step in range(3))
    resumed = TorchBatches(pool, 16, seed=3)
    assert torch.equal(resumed.indices(5), expected[5])
    assert torch.equal(resumed.indices(2), expected[2]), "an earlier step starts over"
