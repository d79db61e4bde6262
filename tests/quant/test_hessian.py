import pytest
import torch

from moqc.errors import InternalError
from moqc.quant.hessian import damped, inverse_factor, output_error


def test_damped() -> None:
    h = torch.stack([torch.diag(torch.tensor([1.0, 3.0])), torch.zeros(2, 2)])
    assert damped(h, 0.1)[0].diagonal().tolist() == pytest.approx([1.2, 3.2])
    assert torch.equal(damped(h, 0.1)[1], torch.eye(2))
    assert h[1].abs().max() == 0


def test_inverse_factor() -> None:
    x = torch.randn(3, 100, 40, generator=torch.Generator().manual_seed(0))
    h = x.mT @ x
    factor = inverse_factor(h)
    assert factor.tril(-1).abs().max() == 0
    torch.testing.assert_close(factor.mT @ factor @ h, torch.eye(40).expand(3, -1, -1), rtol=0, atol=1e-4)


def test_inverse_factor_damps_what_is_indefinite_and_only_that() -> None:
    good = torch.eye(8) * 4
    bad = torch.ones(8, 8) - 0.01 * torch.eye(8)
    factor = inverse_factor(torch.stack([good, bad]))
    torch.testing.assert_close(factor[0], torch.eye(8) / 2)
    assert torch.isfinite(factor).all()


def test_nan_is_an_error() -> None:
    with pytest.raises(InternalError, match="finite"):
        inverse_factor(torch.full((1, 4, 4), torch.nan))


def test_output_error_is_the_error_of_the_outputs() -> None:
    g = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, 50, 12, generator=g), torch.randn(2, 7, 12, generator=g)
    expected = (x @ d.mT).square().sum((1, 2), dtype=torch.float64)
    actual = output_error(d, x.mT @ x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=0)
