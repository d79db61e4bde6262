import pytest
import torch

from moqc.errors import UserError
from moqc.quant.awq import quantize_awq
from moqc.quant.formats import Format
from moqc.quant.hessian import output_error
from moqc.quant.rtn import quantize_rtn

B, N, K = 2, 24, 96


def problem(columns: int = K) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights with outliers, and the Hessian of inputs of which a few channels are strong and alike."""
    g = torch.Generator().manual_seed(0)
    w = torch.randn(B, N, columns, generator=g) * 0.02
    w[:, :, 5] *= 6
    x = torch.randn(B, 300, columns, generator=g) + 2 * torch.randn(B, 300, 1, generator=g)
    return w, x.mT @ x


@pytest.mark.parametrize("name", ["int2-g32", "int3-g64", "int3-g64-sym-s8", "int4-g128-sym"])
def test_clips_where_the_output_gains(name: str) -> None:
    w, h = problem()
    fmt = Format.parse(name)
    clipped, spanning = quantize_awq(w, h, fmt), quantize_rtn(w, fmt, clip="minmax")
    assert (output_error(clipped.dequantize() - w, h) < output_error(spanning.dequantize() - w, h)).all()


def test_is_the_best_of_its_candidates() -> None:
    """One group, one row: the grid of least output error among all eleven."""
    w, h = problem(32)
    w, h = w[:1, :1], h[:1]
    found = output_error(quantize_awq(w, h, Format(2, 32)).dequantize() - w, h)
    errors = []
    for step in range(11):
        scale = (w.amax().clamp(min=0) - w.amin().clamp(max=0)) * (1 - step / 20) / 3
        zero = -w.amin().clamp(max=0) * (1 - step / 20) / scale
        scale = scale.half().float()
        zero = (zero / (3 / 255)).round() * (3 / 255)
        codes = (w / scale + zero).round().clamp(0, 3)
        errors.append(float(output_error(scale * (codes - zero) - w, h)))
    assert float(found) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("columns", [31, 33, 130])
def test_ragged_columns(columns: int) -> None:
    w, h = problem(columns)
    quantized = quantize_awq(w, h, Format(8, 64))
    assert quantized.shape == w.shape
    assert (quantized.dequantize() - w).abs().mean() < 5e-4


def test_refuses_trellis_formats() -> None:
    w, h = problem()
    with pytest.raises(UserError, match="tcq2-g64 cannot"):
        quantize_awq(w, h, Format.tcq(2, 64))
