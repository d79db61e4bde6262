from itertools import pairwise

import pytest
import torch

from moqc.quant import gptq
from moqc.quant.formats import BITS, Format
from moqc.quant.gptq import quantize_gptq, quantize_gptq_each
from moqc.quant.hessian import damped, output_error
from moqc.quant.mcmoe import quantize_mcmoe
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized

B, N, K = 2, 48, 192


def problem(columns: int = K, tokens: int = 400, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian weights and the Hessian of strongly correlated inputs (spectrum 1 to 1/1000)."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.linalg.qr(torch.randn(columns, columns, generator=g))[0]
    x = (torch.randn(B, tokens, columns, generator=g) * torch.logspace(0, -1.5, columns)) @ mix
    return torch.randn(B, N, columns, generator=g) * 0.02, x.mT @ x


def relative(w: torch.Tensor, hessian: torch.Tensor, dequantized: torch.Tensor) -> float:
    return float((output_error(w - dequantized, hessian) / output_error(w, hessian)).mean())


def test_loss_is_that_of_what_is_returned() -> None:
    w, h = problem()
    for fmt in (Format(2, 64), Format(3, 32, symmetric=True)):
        q, loss = quantize_gptq(w, h, fmt)
        assert loss.shape == (B,)
        assert loss.dtype == torch.float64
        torch.testing.assert_close(loss, output_error(w - q.dequantize(), h), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("bits", "share"), [(1, 0.5), (2, 0.4), (3, 0.4), (4, 0.4)])
def test_much_better_than_rounding(bits: int, share: float) -> None:
    w, h = problem()
    fmt = Format(bits, 64)
    rounded = quantize_rtn(w, fmt, importance=h.diagonal(dim1=1, dim2=2))
    q, _ = quantize_gptq(w, h, fmt)
    assert relative(w, h, q.dequantize()) < share * relative(w, h, rounded.dequantize())


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_much_better_than_mcmoe_at_its_own_group(bits: int) -> None:
    """2-bit output error at least halved before any allocation (methods 2.4)."""
    w, h = problem(columns=256)
    ours, _ = quantize_gptq(w, h, Format(bits, 128))
    theirs, _ = quantize_mcmoe(w, h, bits)
    assert relative(w, h, ours.dequantize()) < 0.5 * relative(w, h, theirs)


def test_generalizes_to_other_inputs() -> None:
    w, h = problem()
    _, other = problem(tokens=2000)
    fmt = Format(2, 64)
    q, _ = quantize_gptq(w, h, fmt)
    rounded = quantize_rtn(w, fmt, importance=h.diagonal(dim1=1, dim2=2))
    assert relative(w, other, q.dequantize()) < 0.6 * relative(w, other, rounded.dequantize())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_descent_never_raises_the_damped_loss(bits: int, symmetric: bool, monkeypatch) -> None:
    w, h = problem()
    losses = []
    for sweeps in range(4):
        monkeypatch.setattr(gptq, "SWEEPS", sweeps)
        q, _ = quantize_gptq(w, h, Format(bits, 64, symmetric))
        losses.append(output_error(w - q.dequantize(), damped(h, 0.01)))
    for before, after in pairwise(losses):
        assert (after <= before * (1 + 1e-5)).all()
    assert (losses[-1] < losses[0] * 0.99).all()


def test_identity_hessian_gives_rounding() -> None:
    """Without correlation nothing is propagated; descent can only improve the grids."""
    w, _ = problem()
    fmt = Format(2, 64)
    q, loss = quantize_gptq(w, torch.eye(K).expand(B, -1, -1), fmt)
    rounded = (quantize_rtn(w, fmt).dequantize() - w).square().sum((1, 2))
    assert (loss <= rounded.double() * 1.0001).all()
    assert (loss > rounded.double() * 0.97).all()
    zero, nothing = quantize_gptq(w, torch.zeros(B, K, K), fmt)
    torch.testing.assert_close(zero.dequantize(), q.dequantize())
    assert nothing.abs().max() == 0


def test_dead_columns_are_rounded_not_lost() -> None:
    w, h = problem()
    h[:, 64:128] = 0
    h[:, :, 64:128] = 0
    h[:, 10] = 0
    h[:, :, 10] = 0
    q, _ = quantize_gptq(w, h, Format(3, 64))
    error = (q.dequantize() - w).square()
    assert error[..., 64:128].mean() < 0.04 * w.square().mean()
    assert error[..., 10].mean() < 0.5 * w.square().mean()


@pytest.mark.parametrize("columns", [1, 31, 33, 70, 130])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ragged_columns(columns: int, symmetric: bool) -> None:
    w, h = problem(columns=columns)
    q, loss = quantize_gptq(w, h, Format(4, 64, symmetric))
    assert q.shape == w.shape
    assert (loss < 0.03 * output_error(w, h)).all()


def test_act_order_is_optional_and_helps_a_skewed_hessian() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(B, 400, K, generator=g) * torch.logspace(-1, 1, K)
    x = x + x.mean(-1, keepdim=True) * 3
    w, h = torch.randn(B, N, K, generator=g), x.mT @ x
    with_order, without = (
        quantize_gptq(w, h, Format(2, 64), damping=0.1, act_order=order)[1] for order in (True, False)
    )
    assert (with_order < without).all()


def test_a_batch_equals_its_matrices(monkeypatch) -> None:
    w, h = problem()
    together, loss = quantize_gptq(w, h, Format(2, 64))
    monkeypatch.setattr(gptq, "_CHUNK", 1)
    apart, loss_apart = quantize_gptq(w, h, Format(2, 64))
    assert isinstance(apart, Quantized)
    torch.testing.assert_close(loss_apart, loss, rtol=1e-2, atol=0)
    assert (apart.codes != together.codes).float().mean() < 0.02


def test_several_formats_share_what_does_not_depend_on_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "_CHUNK", 1)  # a matrix at a time
    w, h = problem(seed=9)
    formats = [Format(2, 64), Format(3, 128), Format.tcq(2, 128)]
    apart = [quantize_gptq(w, h, fmt) for fmt in formats]
    factored: list[int] = []
    original = gptq.inverse_factor
    monkeypatch.setattr(gptq, "inverse_factor", lambda m: factored.append(len(m)) or original(m))
    together = quantize_gptq_each(w, h, formats)
    assert factored == [1] * len(w)
    for (one, loss), (other, expected) in zip(together, apart, strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scales, other.scales)
        torch.testing.assert_close(loss, expected)
