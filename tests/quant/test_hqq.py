import pytest
import torch

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.hqq import quantize_hqq
from moqc.quant.rtn import quantize_rtn


def heavy_tailed(rows: int, columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=g) * 0.02
    return w * (1 + 4 * (torch.rand(rows, columns, generator=g) < 0.02))


def norm(difference: torch.Tensor) -> float:
    """Mean of ``|x|^0.7``, what HQQ makes small; small for errors that are large in few places."""
    return float((difference.abs() ** 0.7).mean())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_errors_are_sparser_than_without(bits: int) -> None:
    """The zero points lower the 0.7-norm, and the mean magnitude that the iteration watches."""
    w = heavy_tailed(64, 256)
    fmt = Format(bits, 64)
    found, start = quantize_hqq(w, fmt).dequantize(), quantize_rtn(w, fmt, clip="minmax").dequantize()
    assert norm(found - w) < norm(start - w)
    assert (found - w).abs().mean() < (start - w).abs().mean()


def test_ragged_columns_and_zeros() -> None:
    w = heavy_tailed(5, 70)
    w[2] = 0
    back = quantize_hqq(w, Format(4, 64)).dequantize()
    assert not back[2].any()
    assert (back - w).abs().max() < 0.03
    # The last group has 6 columns: its padding does not count.
    alone = quantize_hqq(w[:, 64:], Format(4, 64)).dequantize()
    assert (alone - w[:, 64:]).abs().mean() <= (back - w)[:, 64:].abs().mean() * 1.5


def test_refuses_symmetric_formats() -> None:
    with pytest.raises(UserError, match="asymmetric"):
        quantize_hqq(torch.zeros(1, 32), Format(3, 64, symmetric=True))
