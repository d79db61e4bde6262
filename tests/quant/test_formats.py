import itertools

import pytest

from moqc.errors import UserError
from moqc.quant.formats import BITS, GROUPS, Format

ALL = [Format(b, g, s) for b, g, s in itertools.product(BITS, GROUPS, (False, True))]


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_name_round_trip(fmt: Format) -> None:
    assert Format.parse(str(fmt)) == fmt


@pytest.mark.parametrize("name", ["int5-g64", "int3-g48", "int3", "fp4-g32", "int3-g64-asym", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="format"):
        Format.parse(name)


def test_stored_bits_counts_scales_zeros_and_padding() -> None:
    assert Format(3, 64).stored_bits(256, 512) == 256 * (512 * 3 + 8 * 24)
    assert Format(3, 64, symmetric=True).stored_bits(256, 512) == 256 * (512 * 3 + 8 * 16)
    # 5 rows are stored as 16, 70 columns as 96, in two groups.
    assert Format(2, 64).stored_bits(5, 70) == 16 * (96 * 2 + 2 * 24)


def test_zero_rule() -> None:
    for fmt in ALL:
        assert fmt.zero_step * 255 == pytest.approx(fmt.levels - 1)
        assert 0 < fmt.symmetric_zero <= fmt.levels / 2
    assert [Format(bits).symmetric_zero for bits in BITS] == [0.5, 1.5, 4, 8, 128]
