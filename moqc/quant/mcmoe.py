"""MC-MoE's own quantizers (arXiv 2410.06270), as its published code runs them: a baseline for `compare`.

The code is github.com/Aaronhuang-778/MC-MoE: ``gptq.py``, ``utils/quantizer_moe.py`` and
``utils/normal_quantizer.py``. Kept as they are there:

* GPTQ in blocks of 128 columns, groups of 128, no act-order; up to 3 bits a column's error reaches later
  blocks only, never the rest of its own block.
* Scales by a narrow search: 0.9 to 1.1 times the range, 101 steps, ``sum |error|^2.4``; float16 scale and
  float16 zero that is not a whole code.
* One bit: ``sign(w)`` at ``mean|w|``.

The search compares its errors in float32 where the original does in float16, which can only help it.
The float zeros are none of moqc's formats, so weights are returned dequantized.
"""

from __future__ import annotations

import torch

from moqc.quant.grid import to_groups
from moqc.quant.hessian import damped, inverse_factor

GROUP = 128
"""Columns a group and a block."""
_OVERHEAD_BITS = 32
"""Float16 scale and float16 zero of a group."""
_NORM = 2.4
_SHRINKS = (1.0, *(1 + i / 500 for i in range(1, 51)), *(1 - i / 500 for i in range(1, 51)))
"""In the original's order: the first of equals wins."""


def quantize_mcmoe(
    w: torch.Tensor, hessian: torch.Tensor, bits: int, *, damping: float = 0.01
) -> tuple[torch.Tensor, int]:
    """Quantize ``w[B, N, K]`` under ``hessian[B, K, K]``.

    Returns:
        Dequantized weights float32 ``[B, N, K]``, and the bits all matrices would occupy: codes without
        padding, 16 bits of scale and 16 of zero a group.

    """
    batch, rows, columns = w.shape
    dead = hessian.diagonal(dim1=-2, dim2=-1) == 0
    work = w.float().masked_fill(dead.unsqueeze(1), 0.0)
    filled = hessian.float() + torch.diag_embed(dead.float())
    factor = inverse_factor(damped(filled, damping))
    result = torch.empty_like(work)
    for start in range(0, columns, GROUP):
        stop = min(start + GROUP, columns)
        block = work[..., start:stop]
        dequantized, errors = _block(block.clone(), factor[:, start:stop, start:stop], bits)
        result[..., start:stop] = dequantized
        work[..., stop:] -= errors @ factor[:, start:stop, stop:]
    groups = -(-columns // GROUP)
    return result, batch * rows * (columns * bits + groups * _OVERHEAD_BITS)


def mcmoe_rtn(w: torch.Tensor, bits: int) -> torch.Tensor:
    """What MC-MoE measures block errors with: min-max rounding with a whole zero, one bit as ``sign * mean``.

    Args:
        w: weights ``[..., N, K]``.
        bits: 1, 2, 3 or more.

    Returns:
        Dequantized weights, float32 of the same shape.

    """
    groups = to_groups(w.float(), GROUP)
    if bits == 1:
        filled = to_groups(torch.ones_like(w, dtype=torch.float32), GROUP).sum(-1, keepdim=True)
        mean = groups.abs().sum(-1, keepdim=True) / filled
        dequantized = torch.where(groups >= 0, mean, -mean)
    else:
        low, high = _range(groups)
        scale = (high - low) / ((1 << bits) - 1)
        zero = (-low / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, (1 << bits) - 1)
        dequantized = scale * (codes - zero)
    return dequantized.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]]


def _block(block: torch.Tensor, factor: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One block ``[B, N, c]``: its dequantized weights, and the errors to propagate to later blocks."""
    scale, zero = _grid(block, bits)
    dequantized, errors = torch.empty_like(block), torch.empty_like(block)
    for j in range(block.shape[-1]):
        column = block[..., j : j + 1]
        dequantized[..., j : j + 1] = _nearest(column, scale, zero, bits)
        error = (column - dequantized[..., j : j + 1]) / factor[:, j, j, None, None]
        errors[..., j : j + 1] = error
        if bits > 3:
            block[..., j:] -= error * factor[:, j, None, j:]
    return dequantized, errors


def _grid(block: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero ``[B, N, 1]`` of a group ``[B, N, c]``, float32 values that float16 holds."""
    if bits == 1:
        scale = _half_scale(block.abs().mean(-1, keepdim=True) * 2)
        return scale, torch.full_like(scale, 0.5)
    low, high = _range(block)
    best = torch.full_like(low, torch.inf)
    scale, zero = torch.zeros_like(low), torch.zeros_like(low)
    for shrink in _SHRINKS:
        tried = _half_scale((high - low) * (shrink / ((1 << bits) - 1)))
        tried_zero = (-low * shrink / tried).half().float()
        difference = _nearest(block, tried, tried_zero, bits) - block
        error = difference.abs_().pow_(_NORM).sum(-1, keepdim=True)
        wins = error < best
        best = torch.where(wins, error, best)
        scale, zero = torch.where(wins, tried, scale), torch.where(wins, tried_zero, zero)
    return scale, zero


def _nearest(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Dequantized nearest level; one bit is the sign, with zero counted as positive."""
    codes = (w >= 0).float() if bits == 1 else (w / scale + zero).round_().clamp_(0, (1 << bits) - 1)
    return scale * (codes - zero)


def _range(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest of each group and 0, ``[..., 1]``; -1 and 1 for a group of zeros."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
    empty = (low == 0) & (high == 0)
    return low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)


def _half_scale(values: torch.Tensor) -> torch.Tensor:
    # A scale below float16's reach would divide by zero: the original fails there.
    return values.half().float().clamp(min=torch.finfo(torch.float16).smallest_normal)
