"""What a step of the CPU kernel holds in numpy's arrays, which no count of torch's tensors sees."""

import torch

from mechint.kernels.cpu.dense_route import KINDS, ROWS
from mechint.kernels.cpu.kernel import DENSE_ABOVE, has_bfloat16_products
from mechint.kernels.cpu.plans import widths_of
from mechint.kernels.cpu.space import chunk_rows
from mechint.sae import SAE, Objective

FLOAT = 4


def step_bytes(sae: SAE, batch: int, dense_step: int) -> int:
    """Buffers of a step of `batch` rows: those that are always there (space.py), the entries at the density up to which
    they are taken, and where a training starts dense those of dense_route.py, which stay. `sae` may be on the meta
    device; `dense_step` is what the dense step takes, for an SAE whose every batch is too dense for this one."""
    d_in, d_sae = sae.d_in, sae.d_sae
    threads, chunk, narrow = torch.get_num_threads(), chunk_rows(d_sae), has_bfloat16_products()
    width, matrix = 64 * -(-d_in // 64), d_in * d_sae * FLOAT
    prefixes = getattr(sae, "prefixes", 0) or len(widths_of(sae, Objective()))
    slices = (1 + prefixes) * batch * width * FLOAT
    padded = 0 if width == d_in else 2 * d_sae * width * FLOAT
    products = threads * chunk * (d_sae + d_in) * (2 if narrow else FLOAT)
    counts = -(-batch // chunk) * d_sae * FLOAT
    always = slices + padded + products + counts + (matrix // 2 if narrow else 0)
    entry = 12 + 20 + {"gated": 12, "jumprelu": 8}.get(sae.architecture, 0)
    limit = DENSE_ABOVE * d_sae
    if sae.architecture in KINDS:
        arrays = 3 if sae.architecture == "gated" else 2
        rows = threads * (arrays - 1) * ROWS * d_sae * FLOAT + -(-batch // ROWS) * d_sae * 20
        dense = arrays * batch * d_sae * FLOAT + 4 * batch * d_in * FLOAT + rows + 4 * matrix
        return always + dense + int(entry * batch * limit)
    if (k := float(sae.k)) < limit:  # pyright: ignore[reportArgumentType]
        return always + int(2 * entry * batch * k)
    return always + dense_step + 2 * matrix
