import pytest
import torch

from moqc.quant import trellis
from moqc.quant.formats import TRELLIS_VALUES, Format
from moqc.quant.gptq import quantize_gptq
from moqc.quant.rtn import quantize_rtn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_finds_the_best_of_all_sequences() -> None:
    """One bit a weight has 65536 sequences a circle: all are tried."""
    targets, weights = normal(12, 16) * 1.3 + 1.5, normal(12, 16, seed=1).square()
    u = (torch.arange(1 << 16).unsqueeze(1) >> torch.arange(16)) & 1
    sequences = 2 * (u ^ u.roll(2, 1)) + u.roll(1, 1)
    errors = ((sequences - targets.unsqueeze(1)).square() * weights.unsqueeze(1)).sum(-1)
    found = trellis.nearest(targets, weights, TRELLIS_VALUES[1])
    torch.testing.assert_close(((found - targets).square() * weights).sum(-1), errors.amin(1))


@pytest.mark.parametrize("bits", TRELLIS_VALUES)
@pytest.mark.parametrize("rows", [1, 2, 3, 14, 15, 16, 17, 40])
def test_what_is_found_can_be_stored(bits: int, rows: int) -> None:
    fmt = Format.tcq(bits, 64)
    targets = normal(3, rows, 5).mT * fmt.symmetric_zero + fmt.symmetric_zero
    values = trellis.nearest(targets, torch.ones_like(targets), fmt.values)
    codes = torch.searchsorted(torch.tensor(fmt.values), values.long()).to(torch.uint8).mT.contiguous()
    stored = trellis.encode(codes)
    assert stored.max() < fmt.levels // 2
    assert torch.equal(trellis.decode(stored)[:, :rows], codes)


@pytest.mark.parametrize(("bits", "share"), [(1, 0.90), (2, 0.82), (3, 0.75)])
def test_beats_scalar_codes_of_the_same_size(bits: int, share: float) -> None:
    """Squared errors of Gaussian weights: 0.32, 0.091, 0.025 of the variance (int: 0.36, 0.12, 0.037)."""
    w = normal(256, 512)
    trellis_error = (quantize_rtn(w, Format.tcq(bits, 128)).dequantize() - w).square().mean()
    scalar = Format(bits, 128, symmetric=True, byte_scales=True)
    assert scalar.stored_bits(256, 512) == Format.tcq(bits, 128).stored_bits(256, 512)
    assert trellis_error < share * (quantize_rtn(w, scalar).dequantize() - w).square().mean()


@pytest.mark.parametrize("bits", [2, 3])
def test_gptq_beats_scalar_codes_of_the_same_size(bits: int) -> None:
    x = normal(600, 128) @ normal(128, 128, seed=1) * torch.logspace(0, -1, 128)
    w, h = normal(2, 40, 128, seed=2) * 0.02, (x.T @ x).expand(2, -1, -1)
    scalar = Format(bits, 64, symmetric=True, byte_scales=True)
    assert (quantize_gptq(w, h, Format.tcq(bits, 64))[1] < 0.9 * quantize_gptq(w, h, scalar)[1]).all()


def test_rows_of_zeros_stay_zero() -> None:
    w = normal(33, 64)
    w[3] = 0
    back = quantize_rtn(w, Format.tcq(2, 64)).dequantize()
    assert not back[3].any()
    assert (back[4] - w[4]).square().mean() < 0.3
