"""Clip search by output error, as AWQ's: rounding to nearest on grids that suit the inputs.

AWQ (arXiv 2306.00978, ``auto_clip`` of its code) tries for every group grids that span 1.0 to 0.5 times its
range and keeps the one whose output, over the group's own inputs, differs least. With D the change of a
group's weights and H the Hessian of its inputs that error is ``D H Dᵀ``. AWQ's scaling of channels is
not made: the experts of a block share their input, and no scale can be folded into what comes before it.
"""

from __future__ import annotations

import torch

from moqc.errors import UserError
from moqc.quant import grid
from moqc.quant.formats import Format
from moqc.quant.rtn import assemble
from moqc.quant.tensor import Quantized

STEPS, SHRINK = 20, 0.5
"""The original's grid: steps of 1/20 of the range, down to half of it."""


def quantize_awq(w: torch.Tensor, hessian: torch.Tensor, fmt: Format) -> Quantized:
    """Quantize ``w[B, N, K]`` for inputs of second moments ``hessian[B, K, K]``.

    Raises UserError for a trellis format, whose rows are not rounded alone.
    """
    if fmt.trellis:
        raise UserError(f"awq rounds every weight alone, {fmt} cannot: take an int format such as int3-g64")
    w, hessian = w.float(), hessian.float()
    values = torch.empty_like(w)
    scales, zeros = [], []
    for start in range(0, w.shape[-1], fmt.group):
        window = slice(start, min(start + fmt.group, w.shape[-1]))
        found = _clip(w[..., window], hessian[:, window, window], fmt)
        flat = w[..., window].reshape(-1, window.stop - window.start)
        values[..., window] = grid.nearest_codes(flat, found, fmt.levels).reshape(w[..., window].shape)
        scales.append(found.scale.reshape(w.shape[:-1]))
        zeros.append(found.zero.reshape(w.shape[:-1]))
    flat_grid = grid.Grid(torch.stack(scales, -1).reshape(-1), torch.stack(zeros, -1).reshape(-1))
    return assemble(values, flat_grid, fmt)


def _clip(w: torch.Tensor, hessian: torch.Tensor, fmt: Format) -> grid.Grid:
    """The best grid of every row of one group ``w[B, N, k]``: flat, ``[B * N]``."""
    flat = w.reshape(-1, w.shape[-1])
    best = grid.spanning(flat, fmt)
    least = torch.full(w.shape[:-1], torch.inf, device=w.device)
    for step in range(int(STEPS * SHRINK) + 1):
        tried = grid.spanning(flat, fmt, 1 - step / STEPS)
        codes = grid.nearest_codes(flat, tried, fmt.levels)
        rounded = tried.scale.unsqueeze(-1) * (codes - tried.zero.unsqueeze(-1))
        change = rounded.reshape(w.shape) - w
        error = ((change @ hessian) * change).sum(-1)
        wins = (error < least).reshape(-1)
        best = grid.Grid(torch.where(wins, tried.scale, best.scale), torch.where(wins, tried.zero, best.zero))
        least = torch.minimum(error, least)
    return best
