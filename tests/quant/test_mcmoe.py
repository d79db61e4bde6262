import pytest
import torch

from moqc.quant.mcmoe import mcmoe_rtn, quantize_mcmoe


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def relative_mse(w: torch.Tensor, dequantized: torch.Tensor) -> float:
    return float((dequantized - w).square().sum() / w.square().sum())


@pytest.mark.parametrize(("bits", "error"), [(1, 0.360), (2, 0.203), (3, 0.0381), (4, 0.0089)])
def test_weight_errors_are_the_published_codes(bits: int, error: float) -> None:
    """The second row of the table in notes/methods.md 2.4: N(0, 1), group 128."""
    w = gaussian(1, 512, 1024)
    dequantized, stored = quantize_mcmoe(w, torch.eye(1024).unsqueeze(0), bits)
    assert relative_mse(w, dequantized) == pytest.approx(error, rel=0.01)
    assert stored == w.numel() * bits + 512 * 8 * 32


@pytest.mark.parametrize(("bits", "error"), [(1, 0.360), (2, 0.254), (3, 0.0466), (4, 0.0101)])
def test_rounding_errors_are_the_published_codes(bits: int, error: float) -> None:
    """The first row of the same table."""
    w = gaussian(512, 1024)
    assert relative_mse(w, mcmoe_rtn(w, bits)) == pytest.approx(error, rel=0.01)


def test_one_bit_is_sign_times_mean() -> None:
    w = gaussian(2, 8, 128)
    scale = (w.abs().mean(-1, keepdim=True) * 2).half().float() / 2
    dequantized, _ = quantize_mcmoe(w, torch.eye(128).expand(2, -1, -1), 1)
    torch.testing.assert_close(dequantized, torch.where(w >= 0, scale, -scale))
    torch.testing.assert_close(mcmoe_rtn(w, 1), torch.where(w >= 0, 1, -1) * w.abs().mean(-1, keepdim=True))


def correlated(columns: int) -> torch.Tensor:
    x = gaussian(1, 600, columns) + gaussian(1, 600, 1) * 2
    return x.mT @ x


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_low_bits_do_not_propagate_within_a_block(bits: int) -> None:
    """The first 128 columns come out as if nothing were propagated; the next ones do not."""
    w = gaussian(1, 16, 256)
    free, _ = quantize_mcmoe(w, torch.eye(256).unsqueeze(0), bits)
    bound, _ = quantize_mcmoe(w, correlated(256), bits)
    torch.testing.assert_close(bound[..., :128], free[..., :128])
    assert (bound[..., 128:] - free[..., 128:]).abs().max() > 0.01


def test_four_bits_do_propagate_within_a_block() -> None:
    w = gaussian(1, 16, 128)
    free, _ = quantize_mcmoe(w, torch.eye(128).unsqueeze(0), 4)
    bound, _ = quantize_mcmoe(w, correlated(128), 4)
    assert (bound - free).abs().max() > 0.01


def test_dead_columns_become_zero_weights() -> None:
    w = gaussian(1, 4, 128)
    h = correlated(128)
    h[:, 5] = 0
    h[:, :, 5] = 0
    dequantized, _ = quantize_mcmoe(w, h, 3)
    assert dequantized[..., 5].abs().max() < 0.4


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_ragged_groups(bits: int) -> None:
    w = gaussian(2, 8, 200)
    dequantized, stored = quantize_mcmoe(w, torch.eye(200).expand(2, -1, -1), bits)
    assert dequantized.shape == w.shape
    assert stored == 2 * 8 * (200 * bits + 2 * 32)
    limit = {1: 0.4, 2: 0.26, 3: 0.05}[bits]
    assert relative_mse(w, dequantized) < limit
    assert relative_mse(w, mcmoe_rtn(w, bits)) < limit


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_rounding_keeps_groups_of_zeros(bits: int) -> None:
    assert mcmoe_rtn(torch.zeros(2, 128), bits).abs().max() == 0
