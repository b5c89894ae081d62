"""Random streams that follow from one seed and have nothing in common.

Philox4x64 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") has a key of two words, here the seed and
what the numbers are for, and a counter of four, here where they are drawn (a step, an epoch) above the number of the
draw. So no stream is another one moved, and any place can be drawn from without what comes before it. The raw output is
fixed by the paper and does not depend on numpy's version.
"""

import numpy as np

# What the second word of the key stands for. Never reuse a number: resuming a saved run depends on it.
BATCHES, LIVE, PREFIXES, RESAMPLING, EPOCHS = range(5)


def philox(seed: int, stream: int, *at: int) -> np.random.Philox:
    """The stream at a place of up to three numbers."""
    words = [0] * (4 - len(at)) + list(at)
    return np.random.Philox(key=np.array([seed, stream], dtype=np.uint64), counter=np.array(words, dtype=np.uint64))
