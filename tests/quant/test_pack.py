import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_codes import random_codes

from moqc.errors import InternalError
from moqc.quant import grid
from moqc.quant.formats import ALL_FORMATS, BITS, Format
from moqc.quant.pack import FIELDS, LINE, pack, unpack
from moqc.quant.tensor import Quantized


def random_quantized(fmt: Format, shape: tuple[int, ...], seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = random_codes(fmt, shape, generator)
    scales = torch.randn(groups, generator=generator).half()
    if fmt.byte_scales:
        scales = grid.rounded(scales.float().abs(), scales, fmt).scale.half()
    zeros = torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, None if fmt.symmetric else zeros)


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.sampled_from(ALL_FORMATS),
    lead=st.lists(st.integers(1, 3), max_size=2),
    rows=st.integers(1, 40),
    columns=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_unpack_inverts_pack(fmt: Format, lead: list[int], rows: int, columns: int, seed: int) -> None:
    q = random_quantized(fmt, (*lead, rows, columns), seed)
    packed = pack(q)
    assert packed.nbytes * 8 == q.stored_bits
    back = unpack(packed, fmt, rows, columns)
    torch.testing.assert_close(back.codes, q.codes, rtol=0, atol=0)
    torch.testing.assert_close(back.scales, q.scales, rtol=0, atol=0)
    torch.testing.assert_close(back.zeros, q.zeros, rtol=0, atol=0)


@pytest.mark.parametrize("bits", BITS)
def test_layout_is_the_documented_one(bits: int) -> None:
    """Every code is found where the module's formula puts it."""
    q = random_quantized(Format(bits, 64), (2, 20, 70), seed=bits)
    packed = pack(q)
    assert packed.codes.shape == (2, 2, 3, bits, LINE)
    assert packed.scales.shape == packed.zeros.shape == (2, 2, 2, 16)
    codes = q.codes.numpy()
    for n, k in [(0, 0), (0, 1), (3, 4), (15, 31), (16, 32), (19, 69), (7, 47), (11, 20)]:
        v, j = divmod(k % 32, 4)
        value = 0
        for field in FIELDS[bits][v]:
            byte = int(packed.codes[1, n // 16, k // 32, field.line, 4 * (n % 16) + j])
            value |= (byte >> field.shift & field.mask) << field.place
        assert value == codes[1, n, k], (n, k)
    assert packed.scales[1, 1, 1, 3] == q.scales[1, 19, 1].numpy()
    assert packed.zeros[0, 0, 1, 5] == q.zeros[0, 5, 1].numpy()


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_trellis_layout_is_the_documented_one(bits: int) -> None:
    """A plane of u, whose neighbours in the circle of 16 rows make the lower bits, then the rest."""
    q = random_quantized(Format.tcq(bits, 64), (20, 70), seed=bits)
    packed = pack(q)
    assert packed.codes.shape == (2, 3, bits, LINE)
    assert packed.scales.dtype == np.uint8

    def u(n: int, k: int) -> int:
        return int(packed.codes[n // 16, k // 32, 0, 4 * (n % 16) + k % 4]) >> (k % 32 // 4) & 1

    for n, k in [(0, 0), (1, 5), (2, 37), (15, 31), (16, 32), (17, 69), (19, 40)]:
        first, v = n // 16 * 16, k % 32 // 4
        before, earlier = (first + (n - distance) % 16 for distance in (1, 2))
        high = 0
        if bits > 1:
            line, shift = (1, v) if bits == 2 else (1 + v % 4 // 2, 4 * (v // 4) + 2 * (v % 2))
            high = int(packed.codes[n // 16, k // 32, line, 4 * (n % 16) + k % 4]) >> shift
        high &= (1 << bits - 1) - 1
        assert 4 * high + 2 * (u(n, k) ^ u(earlier, k)) + u(before, k) == q.codes[n, k], (n, k)
    scale = np.array([packed.scales[1, 1, 3]], np.uint16) << 7
    assert scale.view(np.float16) == q.scales[19, 1].numpy()


def test_refuses_what_the_format_cannot_store() -> None:
    q = random_quantized(Format.tcq(2, 64), (20, 70), seed=0)
    codes = q.codes.clone()
    codes[5, 7] ^= 1
    with pytest.raises(InternalError, match="trellis"):
        pack(Quantized(q.format, codes, q.scales, None))
    for wrong in (-q.scales, q.scales * 1.03):
        with pytest.raises(InternalError, match="byte scales"):
            pack(Quantized(q.format, q.codes, wrong, None))


def test_padding_is_zero() -> None:
    q = random_quantized(Format(8, 32), (3, 5), seed=0)
    packed = pack(q)
    assert np.all(packed.scales[0, :, 3:] == 0)
    assert np.count_nonzero(packed.codes) <= q.codes.numel()
