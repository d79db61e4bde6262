"""The column loops of `moqc.quant.columns` as Triton kernels, for int formats.

A program takes 32 rows of one matrix and goes over all columns of the block, whose targets or gradients stay
in registers. Column c of the tile is read as a sum over all columns under a mask: registers have no index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moqc.errors import InternalError

ROWS = 32
"""Rows of a matrix in one program, a warp."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 of that size has no fractional bits, so adding it rounds half to even."""


@triton.jit
def _nearest(targets, top):
    clamped = tl.minimum(tl.maximum(targets, 0.0), top)
    return (clamped + _ROUND) - _ROUND


@triton.jit
def _propagate(
    w, factor, scale, zero, values, errors, rows, top,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    matrix, square = batch * COUNT * rows, batch * COUNT * COUNT
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    inside = n < rows
    both = (j[:, None] < COUNT) & inside[None, :]
    tile = tl.load(w + matrix + j[:, None] * rows + n[None, :], mask=both, other=0.0)
    for c in range(COUNT):
        target = tl.sum(tl.where(j[:, None] == c, tile, 0.0), axis=0)
        at = matrix + c * rows + n
        step = tl.load(scale + at, mask=inside, other=0.0)
        middle = tl.load(zero + at, mask=inside, other=0.0)
        inverse = tl.where(step == 0, 0.0, 1 / tl.where(step == 0, 1.0, step))
        value = _nearest(target * inverse + middle, top)
        line = factor + square + c * COUNT
        error = (target - step * (value - middle)) / tl.load(line + c)
        tl.store(values + at, value, mask=inside)
        tl.store(errors + at, error, mask=inside)
        later = tl.load(line + j, mask=(j > c) & (j < COUNT), other=0.0)
        tile -= later[:, None] * error[None, :]


@triton.jit
def _move(
    values, residual, gradient, own, scale, rows, top, value_batch, residual_batch,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    inside = n < rows
    both = (j[:, None] < COUNT) & inside[None, :]
    offsets = batch * COUNT * rows + j[:, None] * rows + n[None, :]
    tile = tl.load(gradient + offsets, mask=both, other=0.0)
    step = tl.load(scale + batch * rows + n, mask=inside, other=0.0)
    inverse = tl.where(step == 0, 0.0, 1 / tl.where(step == 0, 1.0, step))
    for c in range(COUNT):
        slope = tl.sum(tl.where(j[:, None] == c, tile, 0.0), axis=0)
        line = own + batch * COUNT * COUNT + c * COUNT
        old = values + batch * value_batch + c * rows + n
        left = residual + batch * residual_batch + c * rows + n
        value = tl.load(old, mask=inside, other=0.0)
        new = _nearest(value + slope / tl.load(line + c) * inverse, top)
        change = (new - value) * step
        tl.store(old, new, mask=inside)
        tl.store(left, tl.load(left, mask=inside, other=0.0) - change, mask=inside)
        later = tl.load(line + j, mask=(j > c) & (j < COUNT), other=0.0)
        tile -= later[:, None] * change[None, :]


def propagate(
    w: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `moqc.quant.columns.propagate`, with scale and zero ``[B, J, N]``; `w` stays as it was."""
    batch, count, rows = w.shape
    inputs = [tensor.contiguous() for tensor in (w, factor, scale, zero)]
    values, errors = torch.empty_like(inputs[0]), torch.empty_like(inputs[0])
    _propagate[triton.cdiv(rows, ROWS), batch](
        *inputs, values, errors, rows, float(levels - 1),
        COUNT=count, WIDTH=triton.next_power_of_2(count), ROWS=ROWS, num_warps=1,
    )  # fmt: skip
    return values, errors


def move(
    values: torch.Tensor,
    residual: torch.Tensor,
    gradient: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    levels: int,
) -> None:
    """As `moqc.quant.columns.move`; `gradient` stays as it was."""
    batch, count, rows = values.shape
    if any(tensor.stride()[1:] != (rows, 1) for tensor in (values, residual)):
        raise InternalError(f"columns of strides {values.stride()}, {residual.stride()} are not contiguous")
    inputs = [tensor.contiguous() for tensor in (gradient, own, scale)]
    _move[triton.cdiv(rows, ROWS), batch](
        values, residual, *inputs, rows, float(levels - 1), values.stride(0), residual.stride(0),
        COUNT=count, WIDTH=triton.next_power_of_2(count), ROWS=ROWS, num_warps=1,
    )  # fmt: skip
