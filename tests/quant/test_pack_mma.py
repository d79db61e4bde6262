from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_codes import random_codes

from moqc.quant import trellis
from moqc.quant.formats import ALL_FORMATS, BITS, TRELLIS_VALUES, Format
from moqc.quant.grid import rounded
from moqc.quant.pack_mma import PackedUnits, field_bits, fields, pack_units, packed_shapes, unpack_units
from moqc.quant.tensor import Quantized


def _quantized(fmt: Format, shape: tuple[int, ...], seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = random_codes(fmt, shape, generator)
    scales = torch.rand(groups, generator=generator).half()
    if fmt.byte_scales:
        scales = rounded(scales.float(), scales, fmt).scale.half()
    zeros = None if fmt.symmetric else torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, zeros)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ALL_FORMATS),
    st.integers(1, 40),
    st.integers(1, 600),
    st.integers(0, 3),
)
def test_unpack_inverts_pack(fmt, rows, columns, stacked):
    quantized = _quantized(fmt, (*[2] * (stacked % 2), rows, columns), stacked)
    packed = pack_units(quantized)
    codes, scales = packed_shapes(fmt, rows, columns)
    assert packed.codes.shape[-4:] == codes
    assert packed.scales.shape[-5:] == scales
    back = unpack_units(packed, fmt, rows, columns)
    assert torch.equal(back.codes, quantized.codes)
    assert torch.equal(back.scales, quantized.scales)
    assert fmt.symmetric or torch.equal(back.zeros, quantized.zeros)


WIDTHS = [
    *(Format(bits, 128, symmetric=True) for bits in BITS),
    *(Format.tcq(bits, 128) for bits in TRELLIS_VALUES),
]


@pytest.mark.parametrize("fmt", WIDTHS, ids=str)
def test_every_bit_is_used(fmt):
    """Random bytes are packed codes too: the layout has no gaps."""
    codes, scales = packed_shapes(fmt, 32, 512)
    random = np.random.default_rng(fmt.bits)
    ones = np.full(scales, 0x78, np.uint8) if fmt.byte_scales else np.ones(scales, np.float16)
    packed = PackedUnits(random.integers(0, 256, codes, np.uint8), ones, None)
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


@pytest.mark.parametrize("bits", TRELLIS_VALUES)
def test_planes_become_the_fields_of_an_integer_format(bits):
    """Bit ``b`` of a lane's planes is field ``b // width`` of word ``b % width`` of an integer format."""
    fmt = Format.tcq(bits, 64)
    width = field_bits(fmt)
    for half in range(2):
        for place in product(range(16), range(2), range(2)):
            planes = fields(fmt, 2, half, *place)
            [(lane, word, shift, _, _)] = fields(Format(width, 64), 2, half, *place)
            quarter, at = divmod(word, width)
            plane_bit = shift // width * width + at
            expected = [(lane, quarter * bits + bit, plane_bit, 1, bit) for bit in range(bits)]
            assert planes == expected


def test_a_trellis_by_hand():
    stored = torch.zeros(16, 256, dtype=torch.uint8)
    stored[8 + 5, 128 + 32 * 3 + 8 * 2 + 2 * 1 + 1] = 3  # u and high of row g + 8 = 13, pair 13, h 1
    quantized = Quantized(Format.tcq(2, 128), trellis.decode(stored), torch.ones(16, 2).half(), None)
    lanes = pack_units(quantized).codes.view(np.uint32).reshape(2, 32, 4)
    found = {
        (int(word[0] * 4 + word[2]), int(word[1])): int(lanes[tuple(word)]) for word in np.argwhere(lanes)
    }
    bit = 1 << (16 + 8 + 4 * (13 % 2) + 13 % 8 // 2)
    assert found == {(6, 4 * 5 + 2): bit, (7, 4 * 5 + 2): bit}
