import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.quant.formats import BITS, GROUPS, Format
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized, expand_groups

FORMATS = st.builds(Format, st.sampled_from(BITS), st.sampled_from(GROUPS), st.booleans())


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def relative_mse(w: torch.Tensor, quantized: Quantized) -> float:
    return float((quantized.dequantize() - w).square().sum() / w.square().sum())


@pytest.mark.parametrize(
    ("name", "search", "minmax"),
    [
        # Lloyd-Max on a Gaussian is .363, .118, .0345, .0095; fitted to a finite group, a little less.
        ("int1-g64", 0.345, None),
        ("int1-g128", 0.354, None),
        ("int1-g128-sym", 0.361, None),
        ("int2-g64", 0.105, 0.2025),
        ("int2-g128", 0.112, 0.251),  # MC-MoE's min-max is .254 (methods 2.4)
        ("int2-g128-sym", 0.116, 0.305),
        ("int3-g64", 0.0284, 0.0369),
        ("int3-g128", 0.0327, 0.0458),
        ("int3-g128-sym", 0.0347, 0.0432),
        ("int4-g128", 0.0087, 0.0100),
    ],
)
def test_error_on_gaussian_weights(name: str, search: float, minmax: float | None) -> None:
    w, fmt = gaussian(256, 1024), Format.parse(name)
    assert relative_mse(w, quantize_rtn(w, fmt)) == pytest.approx(search, rel=0.02)
    if minmax is not None:
        assert relative_mse(w, quantize_rtn(w, fmt, clip="minmax")) == pytest.approx(minmax, rel=0.02)


def test_eight_bits_are_nearly_exact() -> None:
    w = gaussian(64, 256)
    for symmetric in (False, True):
        assert relative_mse(w, quantize_rtn(w, Format(8, 64, symmetric))) < 6e-5


@settings(max_examples=60, deadline=None)
@given(
    fmt=FORMATS,
    lead=st.lists(st.integers(1, 2), max_size=2),
    rows=st.integers(1, 5),
    columns=st.integers(1, 150),
    clip=st.sampled_from(["search", "minmax"]),
    seed=st.integers(0, 2**31),
)
def test_weights_in_range_are_within_half_a_step(
    fmt: Format, lead: list[int], rows: int, columns: int, clip: str, seed: int
) -> None:
    w = gaussian(*lead, rows, columns, seed=seed)
    q = quantize_rtn(w, fmt, clip=clip)
    scale = expand_groups(q.scales.float(), fmt.group, columns)
    zero = expand_groups(q.zero_points, fmt.group, columns)
    ends = torch.stack([-scale * zero, scale * (fmt.levels - 1 - zero)]).sort(0).values
    inside = (w >= ends[0]) & (w <= ends[1])
    assert int(q.codes.max()) < fmt.levels
    assert ((q.dequantize() - w).abs() <= scale.abs() * 0.5001 + 1e-6)[inside].all()


@settings(max_examples=30, deadline=None)
@given(fmt=FORMATS, columns=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_search_is_never_worse_than_minmax(fmt: Format, columns: int, seed: int) -> None:
    w = gaussian(3, columns, seed=seed)
    found, spanned = quantize_rtn(w, fmt), quantize_rtn(w, fmt, clip="minmax")
    if fmt.bits > 1:
        assert relative_mse(w, found) <= relative_mse(w, spanned) * 1.0001


def test_importance_moves_the_error_away_from_what_matters() -> None:
    w = gaussian(64, 256)
    importance = torch.where(torch.arange(256) % 4 == 0, 100.0, 1.0)
    fmt = Format(2, 64)
    plain, weighted = (quantize_rtn(w, fmt, importance=i).dequantize() - w for i in (None, importance))
    assert (weighted.square() * importance).sum() < 0.9 * (plain.square() * importance).sum()
    assert weighted.square().sum() > plain.square().sum()


def test_dead_columns_and_zero_importance() -> None:
    w, fmt = gaussian(2, 8, 96), Format(3, 32)
    dead = torch.ones(2, 96)
    dead[0, 32:64] = 0  # a whole group
    dead[1] = 0  # a whole matrix
    q = quantize_rtn(w, fmt, importance=dead)
    plain = quantize_rtn(w, fmt)
    torch.testing.assert_close(q.dequantize(), plain.dequantize())


@pytest.mark.parametrize("clip", ["search", "minmax"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_special_groups(bits: int, symmetric: bool, clip: str) -> None:
    fmt = Format(bits, 32, symmetric)
    w = torch.tensor([0.0, 0.75, -0.75, 1e6]).unsqueeze(1).expand(4, 32)
    values = quantize_rtn(w, fmt, clip=clip).dequantize()
    assert torch.isfinite(values).all()
    assert values[0].abs().max() == 0
    if not (bits == 1 and clip == "minmax" and symmetric):
        torch.testing.assert_close(values[1:3], w[1:3], rtol=2e-3, atol=0)


def test_bfloat16_weights_are_taken() -> None:
    w = gaussian(4, 64).bfloat16()
    torch.testing.assert_close(quantize_rtn(w, Format(8, 64)).dequantize(), w.float(), rtol=0, atol=0.02)
