"""The column loops of `moqc.quant.columns` as Triton kernels, for int formats.

A program takes 32 rows of one matrix and goes over all columns of the block, whose targets or gradients stay
in registers. Column c of the tile is read as a sum over all columns under a mask: registers have no index.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 32
"""Rows of a matrix in one program, a warp."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 of that size has no fractional bits, so adding it rounds half to even."""


@triton.jit  # type: ignore[untyped-decorator]
def _nearest(targets: Any, top: Any) -> Any:
    clamped = tl.minimum(tl.maximum(targets, 0.0), top)
    return (clamped + _ROUND) - _ROUND


@triton.jit  # type: ignore[untyped-decorator]
def _propagate(
    w, factor, scale, zero, values, errors, rows, top, w_batch, scale_batch, value_batch,
    factor_batch, factor_row, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    inside = n < rows
    both = (j[:, None] < COUNT) & inside[None, :]
    offsets = j[:, None] * rows + n[None, :]
    tile = tl.load(w + batch * w_batch + offsets, mask=both, other=0.0)
    for c in range(COUNT):
        target = tl.sum(tl.where(j[:, None] == c, tile, 0.0), axis=0)
        at = c * rows + n
        step = tl.load(scale + batch * scale_batch + at, mask=inside, other=0.0)
        middle = tl.load(zero + batch * scale_batch + at, mask=inside, other=0.0)
        inverse = tl.where(step == 0, 0.0, 1 / tl.where(step == 0, 1.0, step))
        value = _nearest(target * inverse + middle, top)
        line = factor + batch * factor_batch + c * factor_row
        error = (target - step * (value - middle)) / tl.load(line + c)
        tl.store(values + batch * value_batch + at, value, mask=inside)
        tl.store(errors + batch * value_batch + at, error, mask=inside)
        later = tl.load(line + j, mask=(j > c) & (j < COUNT), other=0.0)
        tile -= later[:, None] * error[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _move(
    values, residual, gradient, own, scale, rows, top, value_batch, residual_batch, gradient_batch,
    own_batch, own_row, scale_batch, COUNT: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.arange(0, WIDTH)
    inside = n < rows
    both = (j[:, None] < COUNT) & inside[None, :]
    offsets = j[:, None] * rows + n[None, :]
    tile = tl.load(gradient + batch * gradient_batch + offsets, mask=both, other=0.0)
    step = tl.load(scale + batch * scale_batch + n, mask=inside, other=0.0)
    inverse = tl.where(step == 0, 0.0, 1 / tl.where(step == 0, 1.0, step))
    for c in range(COUNT):
        slope = tl.sum(tl.where(j[:, None] == c, tile, 0.0), axis=0)
        at = c * rows + n
        line = own + batch * own_batch + c * own_row
        value = tl.load(values + batch * value_batch + at, mask=inside, other=0.0)
        new = _nearest(value + slope / tl.load(line + c) * inverse, top)
        change = (new - value) * step
        left = tl.load(residual + batch * residual_batch + at, mask=inside, other=0.0)
        tl.store(values + batch * value_batch + at, new, mask=inside)
        tl.store(residual + batch * residual_batch + at, left - change, mask=inside)
        later = tl.load(line + j, mask=(j > c) & (j < COUNT), other=0.0)
        tile -= later[:, None] * change[None, :]


def propagate(
    w: torch.Tensor, factor: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `moqc.quant.columns.propagate`; `scale` and `zero` ``[B, J, N]`` are strided alike."""
    batch, count, rows = w.shape
    values, errors = (torch.empty_like(w, memory_format=torch.contiguous_format) for _ in range(2))
    _propagate[triton.cdiv(rows, ROWS), batch](
        w, factor, scale, zero, values, errors, rows, float(levels - 1), w.stride(0), scale.stride(0),
        values.stride(0), factor.stride(0), factor.stride(1), COUNT=count, WIDTH=triton.next_power_of_2(count), ROWS=ROWS,
        num_warps=1,
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
    _move[triton.cdiv(rows, ROWS), batch](
        values, residual, gradient, own, scale, rows, float(levels - 1), values.stride(0),
        residual.stride(0), gradient.stride(0), own.stride(0), own.stride(1), scale.stride(0),
        COUNT=count, WIDTH=triton.next_power_of_2(count), ROWS=ROWS, num_warps=1,
    )  # fmt: skip
