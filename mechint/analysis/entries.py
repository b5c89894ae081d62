"""The active entries of stored activations, batch by batch: which latents fire on which rows, and how strongly.

On a CPU the encoder product and the choice of entries are those of the sparse training kernel: bfloat16 proposes where
the processor is fast at it, every proposed entry is computed again in float32, and a proven bound leaves none out, so
that values are float32's to rounding. Elsewhere, and for architectures that it does not know, `SAE.encode` decides.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechint.data.store import Activations, open_activations
from mechint.errors import MechintError
from mechint.kernels import entry_finder
from mechint.sae import SAE

# Entries of a [rows, d_sae] block that exist at once: 128 MB in float32, whatever the size of the dictionary.
MAX_BLOCK_ELEMENTS = 2**25
BATCH_ROWS = 4096
MAPPED_BYTES = 2**27  # of a store that are held in memory at once


class Entries(NamedTuple):
    """Active entries of `n_rows` rows from `row` on, row by row and by ascending latent.

    Row r's end at `ends[r]`; they begin where those of the row before end, or at `c * capacity` for the first row of
    chunk c = r // chunk. The arrays are used again for the next batch.
    """

    row: int
    n_rows: int
    chunk: int
    capacity: int
    cols: np.ndarray  # int32
    values: np.ndarray  # float32
    ends: np.ndarray  # int64

    def flat(self, which: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`(row, latent, value)` of each entry that is above 0, as arrays of their own; rows counted from `row`.

        `which` are the rows wanted, ascending; all if not given.
        """
        r = np.arange(self.n_rows) if which is None else which
        starts = np.where(r % self.chunk == 0, r // self.chunk * self.capacity, self.ends[r - 1])
        lengths = self.ends[r] - starts
        before = np.cumsum(lengths) - lengths
        at = np.repeat(starts - before, lengths) + np.arange(lengths.sum())
        rows, cols, values = np.repeat(r, lengths), self.cols[at], self.values[at]
        fired = values > 0
        return rows[fired], cols[fired], values[fired]

    def silence(self, which: np.ndarray) -> None:
        """Set the values of these rows to 0, which nothing that reads entries counts as firing."""
        for r in which.tolist():
            start = r // self.chunk * self.capacity if r % self.chunk == 0 else self.ends[r - 1]
            self.values[start : self.ends[r]] = 0.0


def active_entries(
    sae: SAE, acts: Float[Tensor, "n d_in"] | Activations, *, batch_size: int = BATCH_ROWS
) -> Iterator[Entries]:
    """All rows in order. What is yielded is valid until the next is asked for.

    Raises:
        MechintError: the activations are not as wide as the SAE, or a row holds NaN or Inf.
    """
    d_in = acts.shape[1] if isinstance(acts, Tensor) else acts.d_in
    if d_in != sae.d_in:
        raise MechintError(f"the activations are {d_in} wide (d_in), the SAE expects {sae.d_in}")
    batch_size = max(1, min(batch_size, MAX_BLOCK_ELEMENTS // sae.d_sae))
    finder = entry_finder(sae)
    row = 0
    for x in acts.split(batch_size) if isinstance(acts, Tensor) else _stored_batches(acts, batch_size):
        if len(x) == 0:
            continue
        with torch.no_grad():  # not inference_mode: buffers made in it are closed to other threads
            found = finder.find(x) if finder is not None else None
            yield _dense(sae, x, row) if found is None else Entries(row, len(x), *found)
        row += len(x)


def _stored_batches(acts: Activations, batch_size: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """All rows in order. The files are mapped anew every `MAPPED_BYTES`: what was read of the old mapping would count
    as this process's memory until the end, the whole store at last."""
    opened = acts
    rows_a_mapping = max(1, MAPPED_BYTES // max(1, acts.nbytes // acts.n_rows))
    mapped_to = 0
    for start in range(0, acts.n_rows, batch_size):
        if start >= mapped_to:
            mapped_to = start + rows_a_mapping
            try:
                opened = open_activations(acts.path)
            except MechintError:
                opened = acts  # moved since it was opened; its mapping still holds
        yield opened.rows(torch.arange(start, min(start + batch_size, acts.n_rows)))


def _dense(sae: SAE, x: Float[Tensor, "batch d_in"], row: int) -> Entries:
    if not bool(x.isfinite().all()):
        bad = int((~x.isfinite()).any(dim=1).nonzero()[0])
        raise MechintError(f"row {row + bad} of the activations holds NaN or Inf: collect again, or leave that row out")
    feature_acts = sae.encode(x.to(sae.W_enc.device, torch.float32))
    rows, cols = feature_acts.nonzero(as_tuple=True)
    values = feature_acts[rows, cols].float().cpu().numpy()
    ends = torch.bincount(rows, minlength=len(x)).cumsum(0).cpu().numpy()
    return Entries(row, len(x), len(x), 0, cols.to(torch.int32).cpu().numpy(), values, ends)
