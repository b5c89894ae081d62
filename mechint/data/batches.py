"""Which rows are held out and which rows each training step sees. Every choice follows from a seed."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechint.config import SAETrainConfig
from mechint.data.norms import outliers
from mechint.data.store import Activations
from mechint.errors import MechintError
from mechint.streams import BATCHES, EPOCHS, philox

# Of the permutation of an epoch: four of each half, as many as make a Feistel network hard to tell from random
# (Luby and Rackoff 1988).
ROUNDS = 8


@runtime_checkable
class Rows(Protocol):
    """What batches are taken from: an opened activation store, seen as a table of float32 rows."""

    n_rows: int
    text_ids: Any

    def rows(self, indices: Int[Tensor, " n"]) -> Float[Tensor, "n d_in"]: ...


def deterministic_split_indices(
    n: int, val_fraction: float, seed: int
) -> tuple[Int[Tensor, " n_train"], Int[Tensor, " n_val"]]:
    """The original's split: of a seeded permutation of the rows, the first `int(n * val_fraction)` are held out.

    Rows of one text land on both sides; `split_indices(..., by="text")` holds out whole texts instead.
    """
    permutation = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    n_val = int(n * val_fraction)
    return permutation[n_val:], permutation[:n_val]


def split_indices(
    activations: Rows, val_fraction: float, seed: int, by: Literal["text", "row"] = "text"
) -> tuple[Int[Tensor, " n_train"], Int[Tensor, " n_val"]]:
    """`(train, val)` row indices. By text, both are ascending, and at least one text is held out if any is asked for.

    Raises:
        MechintError: nothing would be left to train on, or a split by text of activations that do not know their texts.
    """
    if by == "row":
        train, val = deterministic_split_indices(activations.n_rows, val_fraction, seed)
    else:
        if activations.text_ids is None:
            raise MechintError("these activations do not say which text a row is from: use --split-by row")
        texts, row_text = torch.unique(activations.text_ids, return_inverse=True)
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        n_val = max(1, int(len(texts) * val_fraction)) if val_fraction > 0 else 0
        held_out = torch.zeros(len(texts), dtype=torch.bool)
        held_out[order[:n_val]] = True
        row_held_out = held_out[row_text]
        train, val = (~row_held_out).nonzero().squeeze(1), row_held_out.nonzero().squeeze(1)
    if len(train) == 0:
        raise MechintError(
            f"a validation share of {val_fraction:g} leaves nothing to train on ({activations.n_rows} rows): lower"
            " --val-fraction or collect more texts"
        )
    return train, val


def split_as(config: SAETrainConfig, activations: Activations) -> tuple[Int[Tensor, " n_train"], Int[Tensor, " n_val"]]:
    """`split_indices` with the settings of a training; of one straight from a model, all rows are held out, and dead
    latents are those that are silent on them. Rows above `max_norm_multiple` times the median norm, if one is
    set, are in neither training nor what counts as trained on; held out rows stay as they are.

    Raises:
        MechintError: as `split_indices`.
    """
    if config.live is not None:  # what is stored is what was held out
        train = val = torch.arange(activations.n_rows)
    else:
        train, val = split_indices(activations, config.val_fraction, config.seed, config.split_by)
    if config.max_norm_multiple:
        train = train[~outliers(activations.norms, config.max_norm_multiple).is_outlier[train]]
    return train, val


@runtime_checkable
class BatchOrder(Protocol):
    """Which rows each step sees."""

    def indices(self, step: int) -> Int[Tensor, " batch"]: ...


@final
class ShuffledBatches:
    """Every row once an epoch, each epoch in another order. A batch is a function of (seed, step), and no order is held
    in memory: places are permuted by a Feistel network whose keys are those of the epoch, applied again where it leaves
    the pool ("cycle walking", Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). The batch at the end of
    an epoch is filled up from the next.
    """

    def __init__(self, indices: Int[Tensor, " n"], batch_size: int, seed: int):
        self.pool, self.batch_size, self.seed = indices, batch_size, seed

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """Row indices of the step, ascending: the order within a batch does not matter and reading is faster."""
        n = len(self.pool)
        epochs, places = np.divmod(np.arange(step * self.batch_size, (step + 1) * self.batch_size), n)
        picks = [
            permuted(places[epochs == epoch], n, philox(self.seed, EPOCHS, int(epoch)).random_raw(ROUNDS))
            for epoch in np.unique(epochs)
        ]
        return self.pool[torch.from_numpy(np.concatenate(picks))].sort().values


def permuted(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a permutation of 0 .. n - 1 takes `places`; of `keys`, one a round, the lower 32 bits count."""
    bits = max(2, (n - 1).bit_length())
    low = bits // 2
    masks = np.uint32((1 << low) - 1), np.uint32((1 << (bits - low)) - 1)
    found = np.array(places, dtype=np.int64)
    walking = np.arange(len(found))
    while len(walking):
        at = found[walking]
        halves = [at.astype(np.uint32) & masks[0], (at >> low).astype(np.uint32)]
        for number, key in enumerate(keys.astype(np.uint32)):
            halves[number % 2] ^= _mixed(halves[1 - number % 2] ^ key) & masks[number % 2]
        found[walking] = halves[0].astype(np.int64) | (halves[1].astype(np.int64) << low)
        walking = walking[found[walking] >= n]
    return found


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of MurmurHash3 (Appleby 2011)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


@final
class CounterBatches:
    """The batch of step t is a function of (seed, t), drawn with replacement. The remainder's bias is below
    n_rows / 2**64."""

    def __init__(self, indices: Int[Tensor, " n"], batch_size: int, seed: int):
        self.pool, self.batch_size, self.seed = indices, batch_size, seed

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """Row indices of the step, ascending: the order within a batch does not matter and reading is faster."""
        raw = philox(self.seed, BATCHES, step).random_raw(self.batch_size)
        picks = torch.from_numpy((raw % np.uint64(len(self.pool))).astype(np.int64))
        return self.pool[picks].sort().values


@final
class TorchBatches:
    """The original pipeline's stream: one torch generator with the split's own seed, drawn from step after step.

    Steps must come in order; asking for a later one first draws what lies between (about a second for 50,000 steps).
    """

    def __init__(self, indices: Int[Tensor, " n"], batch_size: int, seed: int):
        self.pool, self.batch_size, self.seed = indices, batch_size, seed
        self._rewind()

    def _rewind(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.next_step = 0

    def indices(self, step: int) -> Int[Tensor, " batch"]:
        """Row indices of the step, in the order drawn."""
        if step < self.next_step:
            self._rewind()
        while True:
            picks = torch.randint(0, len(self.pool), (self.batch_size,), generator=self.generator)
            self.next_step += 1
            if self.next_step > step:
                return self.pool[picks]


def make_batches(
    order: Literal["shuffle", "counter", "torch"], indices: Int[Tensor, " n"], batch_size: int, seed: int
) -> BatchOrder:
    """The batch stream that a config's `batch_order` names."""
    kinds = {"shuffle": ShuffledBatches, "counter": CounterBatches, "torch": TorchBatches}
    return kinds[order](indices, batch_size, seed)


# --- names of the first version, kept -------------------------------------------------------------------------------


def load_activation_tensor(path: str | Path, mmap: bool = True) -> Float[Tensor, "n_rows d_in"]:
    """All activations as one float32 tensor: mapped from the file for a .pt unless `mmap` is False, else in memory."""
    from mechint.data.store import open_activations

    tensor = open_activations(path).tensor()
    return tensor if mmap else tensor.clone()


def load_activations_with_splits(
    path: str | Path, val_fraction: float, seed: int, mmap: bool = True
) -> tuple[Float[Tensor, "n_rows d_in"], Int[Tensor, " n_train"], Int[Tensor, " n_val"]]:
    """`(activations, train_indices, val_indices)` with the original's split by row; the tensor stays whole."""
    activations = load_activation_tensor(path, mmap=mmap)
    return activations, *deterministic_split_indices(len(activations), val_fraction, seed)


def random_batch_iterator(
    activations: Float[Tensor, "n_rows d_in"], batch_size: int, device: str | torch.device, seed: int
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Endless random batches of all rows with replacement, in the original's order, on `device`."""
    return split_batch_iterator(activations, torch.arange(len(activations)), batch_size, device, seed)


def split_batch_iterator(
    activations: Float[Tensor, "n_rows d_in"],
    indices: Int[Tensor, " n"],
    batch_size: int,
    device: str | torch.device,
    seed: int,
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """As `random_batch_iterator`, of the rows that `indices` names."""
    if not len(indices) or batch_size < 1:
        raise MechintError(f"batches of {batch_size} from {len(indices)} rows: there must be at least one of each")
    stream = TorchBatches(indices, batch_size, seed)
    return (activations[stream.indices(step)].to(device) for step in itertools.count())


def iter_activation_batches(
    activations: Float[Tensor, "n_rows d_in"],
    indices: Int[Tensor, " n"] | None,
    batch_size: int,
    device: str | torch.device,
) -> Iterator[Float[Tensor, "batch d_in"]]:
    """The rows of `indices` (all if None) in order, once, on `device`; the last batch may be short."""
    for start in range(0, len(activations) if indices is None else len(indices), batch_size):
        stop = start + batch_size
        batch = activations[start:stop] if indices is None else activations[indices[start:stop]]
        yield batch.to(device)
