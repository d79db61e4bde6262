import pytest

from moqc.errors import UserError
from moqc.quant.formats import ALL_FORMATS, BITS, Format


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_name_round_trip(fmt: Format) -> None:
    assert Format.parse(str(fmt)) == fmt


@pytest.mark.parametrize(
    "name", ["int5-g64", "int3-g48", "int3", "fp4-g32", "int3-g64-asym", "tcq4-g64", "tcq2-g64-sym", ""]
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="format"):
        Format.parse(name)


def test_stored_bits_counts_scales_zeros_and_padding() -> None:
    assert Format(3, 64).stored_bits(256, 512) == 256 * (512 * 3 + 8 * 24)
    assert Format(3, 64, symmetric=True).stored_bits(256, 512) == 256 * (512 * 3 + 8 * 16)
    assert Format.parse("int3-g64-s8").stored_bits(256, 512) == 256 * (512 * 3 + 8 * 16)
    assert Format.parse("int3-g64-sym-s8").stored_bits(256, 512) == 256 * (512 * 3 + 8 * 8)
    assert Format.parse("tcq2-g128").stored_bits(256, 512) == 256 * (512 * 2 + 4 * 8)
    # 5 rows are stored as 16, 70 columns as 96, in two groups.
    assert Format(2, 64).stored_bits(5, 70) == 16 * (96 * 2 + 2 * 24)


def test_zero_rule() -> None:
    for fmt in ALL_FORMATS:
        assert fmt.zero_step * 255 == pytest.approx(fmt.levels - 1)
        assert 0 < fmt.symmetric_zero <= (fmt.values[-1] + 1) / 2
    assert [Format(bits).symmetric_zero for bits in BITS] == [0.5, 1.5, 4, 8, 128]


def test_centred_values_are_int8_multiples_of_the_distance_from_the_zero_point() -> None:
    for fmt in ALL_FORMATS:
        if fmt.centre is None:
            assert not fmt.symmetric or fmt.bits == 8
            continue
        factor, offset = fmt.centre
        centred = [factor * value - offset for value in fmt.values]
        assert centred == [factor * (value - fmt.symmetric_zero) for value in fmt.values]
        assert min(centred) >= -128
        assert max(centred) <= 127
