import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.quant.formats import BITS, GROUPS, Format
from moqc.quant.pack import FIELDS, LINE, pack, unpack
from moqc.quant.tensor import Quantized


def random_quantized(fmt: Format, shape: tuple[int, ...], seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = torch.randint(0, fmt.levels, shape, generator=generator, dtype=torch.uint8)
    scales = torch.randn(groups, generator=generator).half()
    zeros = torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, scales, None if fmt.symmetric else zeros)


@settings(max_examples=60, deadline=None)
@given(
    fmt=st.builds(Format, st.sampled_from(BITS), st.sampled_from(GROUPS), st.booleans()),
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


def test_padding_is_zero() -> None:
    q = random_quantized(Format(8, 32), (3, 5), seed=0)
    packed = pack(q)
    assert np.all(packed.scales[0, :, 3:] == 0)
    assert np.count_nonzero(packed.codes) <= q.codes.numel()
