"""Pieces of the sparse kernel that a wrong answer of would not always show in a step."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mechint.kernels.sparse_choice import kth_largest
from mechint.kernels.sparse_loops import candidates

# finite, of any size, and often equal
NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False), st.sampled_from([0.0, -0.0, 1.0, 2.0**-149, 3.4e38])
)


@settings(max_examples=300, deadline=None)
@given(arrays.arrays(np.float32, st.integers(1, 70), elements=NUMBERS), st.data())
def test_kth_largest_is_exact(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = np.sort(values)[::-1][k - 1]
    assert kth_largest(values, len(values), k) == expected


@pytest.mark.parametrize("values", [[1.0] * 9, [1.0] * 5 + [np.nextafter(np.float32(1), np.float32(0))] * 5])
def test_kth_largest_between_neighbours(values):
    values = np.array(values, np.float32)
    for k in range(1, len(values) + 1):
        assert kth_largest(values, len(values), k) == values[k - 1]


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize("n", [16, 17, 31, 32, 100])
def test_candidates_leave_none_out_and_write_no_further_than_they_say(narrow, n):
    rng = np.random.default_rng(n)
    values, biases, norms = (rng.standard_normal(n).astype(np.float32) for _ in range(3))
    norms = np.abs(norms)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    seen = (bits.astype(np.uint32) << 16).view(np.float32) if narrow else values
    cols = np.full(3 + n + 16, -7, np.int32)
    error, cut = np.float32(0.01), np.float32(0.5)
    stop = candidates(bits if narrow else values, narrow, biases, norms, error, cut, cols, 3)
    relative = 2.0**-8 if narrow else 0.0
    sure = np.flatnonzero(seen + relative * np.abs(seen) + biases + error * norms > cut + 1e-5)
    maybe = np.flatnonzero(seen + 1.1 * relative * np.abs(seen) + biases + error * norms > cut - 1e-5)
    found = cols[3:stop].tolist()
    assert set(sure) <= set(found) <= set(maybe) and found == sorted(set(found))
    assert (cols[:3] == -7).all() and (cols[stop + 16 :] == -7).all()


@pytest.mark.slow
def test_a_processor_without_wide_vectors_finds_the_same(tmp_path: Path):
    """Compiled for a plain x86-64 (or whatever this machine's plainest is), where lanes cannot be packed at once."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}", "-m", "not slow"]
    step = f"{Path(__file__).with_name('test_kernels_sparse.py')}::test_gradients_of_a_batch"
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*words, step, "-k", "topk or candidates"], env=os.environ | plain, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
