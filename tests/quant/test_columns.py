"""The column loops against a matrix that spells GPTQ out, and the GPU's kernels against the loops.

Where torch sees no GPU, Triton's interpreter runs the kernels, if Triton is there: `pip install triton`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

import pytest
import torch

from moqc.quant import columns, grid
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq

FMT = Format.parse("int3-g64")


def problem(batch: int, count: int, rows: int, device: str = "cpu"):
    g = torch.Generator().manual_seed(count)
    x = torch.randn(batch, 3 * count, count, generator=g)
    hessian = x.mT @ x + torch.eye(count)
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian)).mT  # strided by columns, as LAPACK's are
    w = torch.randn(batch, count, rows, generator=g)
    scale = torch.rand(batch, count, rows, generator=g) * 0.4 + 0.1
    scale[:, :, 0] = 0  # a group that stores zeros
    zero = torch.rand(batch, count, rows, generator=g) * 7
    return [tensor.to(device) for tensor in (w, hessian, factor, scale, zero)]


def test_propagate_fixes_columns_one_by_one():
    """GPTQ by its definition: after a column is rounded, the others move to their joint optimum."""
    w, hessian, factor, scale, zero = (tensor.double() for tensor in problem(1, 5, 3))
    values, errors = columns.propagate(w.clone(), factor, grid.Grid(scale, zero), FMT)
    for row in range(3):
        target = w[0, :, row].clone()
        for j in range(5):
            step, middle = scale[0, j, row], zero[0, j, row]
            value = (target[j] / step + middle if step else middle).round().clamp(0, 7)
            assert values[0, j, row] == value
            left = target[j] - step * (value - middle)
            torch.testing.assert_close(errors[0, j, row], left / factor[0, j, j], rtol=1e-5, atol=1e-5)
            rest = slice(j + 1, 5)
            # With column j changed by -left, the others minimise d^T H d over what is not fixed yet.
            target[rest] += torch.linalg.solve(hessian[0, rest, rest], hessian[0, rest, j]) * left


def test_move_never_raises_the_loss():
    w, hessian, _, scale, zero = problem(2, 8, 6)
    step, middle = scale[:, :1].expand_as(w), zero[:, :1].expand_as(w)
    values = torch.randint(0, 8, w.shape, generator=torch.Generator().manual_seed(0)).float()
    residual = w - step * (values - middle)
    loss = torch.einsum("bjn,bjk,bkn->bn", residual, hessian, residual)
    for _ in range(4):
        columns.move(values, residual, hessian @ residual, hessian, scale[:, 0], FMT)
        torch.testing.assert_close(residual, w - step * (values - middle))
        found = torch.einsum("bjn,bjk,bkn->bn", residual, hessian, residual)
        assert (found <= loss * (1 + 1e-5)).all()
        loss = found
    for j in range(8):  # a fixed point: no single value can do better
        for change in (-1, 1):
            other = residual.clone()
            other[:, j] -= step[:, j] * ((values[:, j] + change).clamp(0, 7) - values[:, j])
            assert (torch.einsum("bjn,bjk,bkn->bn", other, hessian, other) >= loss * (1 - 1e-5)).all()


@pytest.fixture
def fused(monkeypatch):
    """The kernels, and where to run them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("the GPU's column loops need Triton")
    if torch.cuda.is_available():
        return importlib.import_module("moqc.quant.columns_triton"), "cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "moqc.quant.columns_triton", raising=False)
    module = importlib.import_module("moqc.quant.columns_triton")
    monkeypatch.delitem(sys.modules, "moqc.quant.columns_triton")
    return module, "cpu"


@pytest.mark.parametrize(("count", "rows"), [(16, 40), (13, 34)])
def test_fused_propagation_is_the_loop(fused, count, rows):
    kernels, device = fused
    w, _, factor, scale, zero = problem(2, count, rows, device)
    wide = torch.randn(2, count + 7, rows, device=device)  # a block of more columns: batches are strided
    wide[:, 3 : 3 + count] = w
    block = wide[:, 3 : 3 + count]
    expected = columns.propagate(w.cpu().clone(), factor.cpu(), grid.Grid(scale.cpu(), zero.cpu()), FMT)
    found = kernels.propagate(block, factor, scale, zero, FMT.levels)
    same = found[0].cpu() == expected[0]
    assert same.float().mean() > 0.99  # a float rounding may take a value to the other side of a tie
    torch.testing.assert_close(found[1].cpu()[same], expected[1][same], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("count", "rows"), [(16, 40), (13, 34)])
def test_fused_descent_is_the_loop(fused, count, rows):
    kernels, device = fused
    w, hessian, _, scale, zero = problem(2, count, rows, device)
    scale, zero = scale[:, 0], zero[:, :1]
    values = torch.full_like(w, 3.0)
    residual = w - scale.unsqueeze(1) * (values - zero)
    expected = [tensor.cpu().clone() for tensor in (values, residual)]
    columns.move(*expected, (hessian @ residual).cpu(), hessian.cpu(), scale.cpu(), FMT)
    wide = hessian.new_zeros(2, count + 5, count + 5)  # parts of something larger
    wide[:, 2:-3, 2:-3] = hessian
    kernels.move(values, residual, hessian @ residual, wide[:, 2:-3, 2:-3], scale, FMT.levels)
    same = values.cpu() == expected[0]
    assert same.float().mean() > 0.99
    torch.testing.assert_close(residual.cpu()[same], expected[1][same], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["int2-g64", "int4-g32-sym"])
def test_quantizers_with_fused_loops_are_as_good(fused, monkeypatch, name):
    """All of GPTQ and descent, with the kernels and without."""
    kernels, device = fused
    g, fmt = torch.Generator().manual_seed(0), Format.parse(name)
    w, x = torch.randn(2, 33, 70, generator=g), torch.randn(2, 200, 70, generator=g)
    x[..., 3] *= 10
    arguments = [tensor.to(device) for tensor in (w, x.mT @ x)]
    monkeypatch.setattr(columns, "_fused", lambda *_: False)
    expected, loss = quantize_gptq(*arguments, fmt)
    monkeypatch.setattr(columns, "_fused", lambda *_: True)
    monkeypatch.setitem(sys.modules, "moqc.quant.columns_triton", kernels)
    monkeypatch.setattr("moqc.quant.columns_triton", kernels, raising=False)
    found, other = quantize_gptq(*arguments, fmt)
    assert (found.codes == expected.codes).float().mean() > 0.9
    torch.testing.assert_close(other, loss, rtol=0.02, atol=0)
