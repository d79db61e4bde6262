from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.quant.formats import BITS, GROUPS, Format
from moqc.quant.pack_mma import PackedUnits, pack_units, packed_shapes, unpack_units
from moqc.quant.tensor import Quantized


def _quantized(fmt: Format, shape: tuple[int, ...], seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = torch.randint(0, fmt.levels, shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, generator=generator).half()
    zeros = None if fmt.symmetric else torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, zeros)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(BITS),
    st.sampled_from(GROUPS),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 600),
    st.integers(0, 3),
)
def test_unpack_inverts_pack(bits, group, symmetric, rows, columns, stacked):
    fmt = Format(bits, group, symmetric)
    quantized = _quantized(fmt, (*[2] * (stacked % 2), rows, columns), stacked)
    packed = pack_units(quantized)
    codes, scales = packed_shapes(fmt, rows, columns)
    assert packed.codes.shape[-4:] == codes
    assert packed.scales.shape[-5:] == scales
    back = unpack_units(packed, fmt, rows, columns)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert symmetric or torch.equal(back.zeros, quantized.zeros)


@pytest.mark.parametrize("bits", BITS)
def test_every_bit_is_used(bits):
    """Random bytes are packed codes too: the layout has no gaps."""
    fmt = Format(bits, 128, symmetric=True)
    codes, scales = packed_shapes(fmt, 32, 512)
    random = np.random.default_rng(bits)
    packed = PackedUnits(random.integers(0, 256, codes, np.uint8), np.ones(scales, np.float16), None)
    again = pack_units(unpack_units(packed, fmt, 32, 512))
    assert np.array_equal(again.codes, packed.codes)


def test_four_bits_by_hand():
    codes = torch.zeros(16, 256, dtype=torch.uint8)
    codes[5, 128 + 32 * 3 + 8 * 2 + 2 * 1 + 1] = 9  # row g = 5; half 1, v 3, q 2, j 1 (pair 13), h 1
    quantized = Quantized(Format(4, 128, True), codes, torch.ones(16, 2).half(), None)
    lanes = pack_units(quantized).codes.view(np.uint32).reshape(4, 32, 4)
    word = 8 + 13 // 2  # of the lane's 16
    assert lanes[word // 4, 4 * 5 + 2, word % 4] == 9 << (16 + 4)
    assert np.count_nonzero(lanes) == 1
