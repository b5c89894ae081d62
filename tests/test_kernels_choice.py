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

from mechint.kernels.cpu.choice import kth_largest
from mechint.kernels.cpu.loops import TILED_ABOVE, candidates, decode_rows, decode_twice

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


@pytest.mark.parametrize("d_in", [64, 100, 192, 512])
@pytest.mark.parametrize("most", [7, 2 * TILED_ABOVE])  # entries a row: read row by row, or tile by tile
def test_two_reconstructions_at_once_have_the_bits_of_each(d_in, most):
    rng = np.random.default_rng(d_in + most)
    n_rows, d_sae, width = 9, 1000, -(-d_in // 64) * 64
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    x, b_dec, W_dec = draw(n_rows, d_in), draw(d_in), np.zeros((d_sae, width), np.float32)
    W_dec[:, :d_in] = draw(d_sae, d_in)
    # from no entry to `most`, so that every remainder of four rows at a time occurs
    sizes = [0, *rng.integers(most // 2, most, n_rows - 2), most] if most > 7 else [0, 1, 2, 3, 4, 5, 6, 7, 4]
    cols = np.concatenate([np.sort(rng.choice(d_sae, n, replace=False)) for n in sizes]).astype(np.int32)
    ends = np.cumsum(sizes).astype(np.int64)
    acts, others = draw(len(cols)), draw(len(cols))
    slices = np.zeros((width // 64, n_rows, 64), np.float32)

    def one(coefficients):
        own_slices, grad = np.zeros_like(slices), np.zeros(len(cols), np.float32)
        place = (np.zeros((n_rows, width), np.float32), 0, cols, coefficients, ends, own_slices, grad)
        return decode_rows(x, b_dec, W_dec, 0, n_rows, *place), own_slices, grad

    total, own_slices, grad = one(acts)
    other_total, _, other_grad = one(others)
    found, other_found = np.zeros((2, len(cols)), np.float32)
    place = (np.zeros((n_rows, width), np.float32), 0, cols, acts, others, ends, slices, found, other_found)
    assert decode_twice(x, b_dec, W_dec, 0, n_rows, *place) == (total, other_total)
    np.testing.assert_array_equal(found, grad)
    np.testing.assert_array_equal(other_found, other_grad)
    np.testing.assert_array_equal(slices, own_slices)
    assert total != other_total and np.abs(grad).min() > 0


@pytest.mark.slow
def test_a_processor_without_wide_vectors_finds_the_same(tmp_path: Path):
    """Compiled for a plain x86-64 (or whatever this machine's plainest is), where lanes cannot be packed at once."""
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}", "-m", "not slow"]
    step = f"{Path(__file__).with_name('test_kernels_sparse.py')}::test_gradients_of_a_batch"
    plain = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*words, step, "-k", "topk or candidates or gated or matryoshka or at_once"],
        env=os.environ | plain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
