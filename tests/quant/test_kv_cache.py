"""Stored keys and values: sizes, and what rounding does to them."""

import numpy as np
import pytest

from moqc.quant.kv_cache import DTYPES, stored_bytes, stored_columns
from moqc.quant.kv_rows import load_rows, store_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 32, 80, 128])
def test_rows_take_the_bytes_that_are_said(dtype, width):
    rows = np.random.default_rng(0).standard_normal((3, 2, width)).astype(np.float32)
    stored = store_rows(rows, dtype)
    assert stored.shape == (3, 2, stored_columns(dtype, width))
    assert stored.dtype == dtype
    assert stored[0, 0].nbytes == stored_bytes(dtype, width)


def test_int8_takes_a_quarter_and_two_bytes_for_32_columns():
    assert (stored_bytes("int8", 128), stored_bytes("float16", 128), stored_bytes("float32", 128)) == (
        136,
        256,
        512,
    )


@pytest.mark.parametrize("width", [5, 80])
def test_int8_is_off_by_half_a_step(width):
    rows = np.random.default_rng(1).standard_normal((50, width)).astype(np.float32)
    rows[0] = 0
    error = np.abs(load_rows(store_rows(rows, "int8"), width) - rows)
    groups = [slice(first, first + 32) for first in range(0, width, 32)]
    step = np.concatenate(
        [np.abs(rows[:, g]).max(1, keepdims=True).repeat(rows[:, g].shape[1], 1) for g in groups], 1
    )
    # Scales have 11 bits, so the largest codes are up to 127 * 2**-12 off as well.
    assert (error <= step / 127 * (0.5 + 127 * 2**-11)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_do_not_fit_are_not_hidden(dtype):
    rows = np.array([[1.0, np.nan, 2.0, 3.0]], np.float32)
    with np.errstate(invalid="ignore"):
        assert np.isnan(load_rows(store_rows(rows, dtype), 4)).any()
