"""Grids: the search for a group's scale and zero byte, shared by every quantizer.

A *grid* is what a group can represent: ``scale * (code - zero_point)`` over all codes. The functions here
work on groups as rows, ``[M, group]``, and on grids already rounded to what is stored (float16 scale, zero
byte), so that an error measured is the error shipped. A short last group is padded with weights 0 of
importance 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

from moqc.quant.device import chunk
from moqc.quant.formats import Format

SHRINK = (0.3, 1.0)
"""Range of the clip search: the grid spans this part of the group's own range."""
CANDIDATES = {1: 1, 2: 22, 3: 22, 4: 15, 6: 8, 8: 4}
"""Grids tried by code width. One bit starts from the group's mean magnitudes instead."""
REFITS = 4
"""Rounds of least-squares refit of scale and zero after the search; each is kept only where it helps."""
_CHUNK = 1 << 18
"""Weights searched at a time: a few temporaries of this size stay in a core's cache."""
_HALF_MAX = 65504.0
_BYTE_MAX = 61440.0
"""The largest finite byte scale."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Stored-precision grids of groups: `scale` float32 (float16 values), `zero` float32 zero points."""

    scale: torch.Tensor
    zero: torch.Tensor


def rounded(scale: torch.Tensor, zero: torch.Tensor, fmt: Format) -> Grid:
    """The nearest grid that the format can store."""
    scale = _byte_scale(scale) if fmt.byte_scales else scale.clamp(-_HALF_MAX, _HALF_MAX).half().float()
    if fmt.symmetric:
        return Grid(scale, torch.full_like(scale, fmt.symmetric_zero))
    return Grid(scale, (zero / fmt.zero_step).round().clamp(0, 255) * fmt.zero_step)


def _byte_scale(scale: torch.Tensor) -> torch.Tensor:
    """The nearest numbers that an upper byte of a float16 can be: no sign, 5 exponent and 3 mantissa bits."""
    bits = scale.clamp(0, _BYTE_MAX).half().view(torch.int16)
    return ((bits + 64) & ~127).view(torch.float16).float()


def inverse(scale: torch.Tensor) -> torch.Tensor:
    """``1 / scale``, and 0 for the scale 0 of a group that stores zeros."""
    return torch.where(scale == 0, 0.0, 1 / scale)


def nearest_codes(w: torch.Tensor, grid: Grid, levels: int) -> torch.Tensor:
    """Codes of the weights ``[M, group]`` on their grids ``[M]``, as float32."""
    codes = w * inverse(grid.scale).unsqueeze(-1)
    return codes.add_(grid.zero.unsqueeze(-1)).round_().clamp_(0, levels - 1)


def search(w: torch.Tensor, importance: torch.Tensor, fmt: Format) -> Grid:
    """Grids that minimise the importance-weighted squared error of each group.

    Args:
        w: groups ``[M, group]`` float32.
        importance: weights of the squared errors ``[M, group]``, not negative.
        fmt: the format.

    Returns:
        Grids ``[M]``.

    """
    rows = max(1, chunk(w.device, _CHUNK) // w.shape[1])
    starts = range(0, max(1, w.shape[0]), rows)
    parts = [_search(w[i : i + rows], importance[i : i + rows], fmt) for i in starts]
    return Grid(torch.cat([part.scale for part in parts]), torch.cat([part.zero for part in parts]))


def spanning(w: torch.Tensor, fmt: Format, shrink: float = 1.0) -> Grid:
    """Grids over `shrink` times the range of each group ``[M, group]``; with 1 nothing is clipped."""
    if fmt.symmetric:
        return rounded(_symmetric_scale(w, fmt) * shrink, torch.zeros(w.shape[0], device=w.device), fmt)
    low, high = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0)
    scale = (high - low) * (shrink / fmt.values[-1])
    return rounded(scale, -low * shrink * inverse(scale), fmt)


def _symmetric_scale(w: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Scale that reaches the largest magnitude; from 3 bits on code 0 stands for it, whatever its sign."""
    extreme = w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1)
    if fmt.symmetric_zero * 2 == fmt.values[-1]:
        return extreme.abs() / fmt.symmetric_zero
    return -extreme / fmt.symmetric_zero


def _search(w: torch.Tensor, importance: torch.Tensor, fmt: Format) -> Grid:
    starts = CANDIDATES[fmt.bits]
    best = _binary_start(w, importance, fmt) if fmt.bits == 1 else spanning(w, fmt)
    error = _error(w, importance, best, fmt)
    for shrink in torch.linspace(*SHRINK, starts + 1)[1:-1].tolist():
        best, error = _better(w, importance, best, error, spanning(w, fmt, shrink), fmt)
    for _ in range(REFITS):
        best, error = _better(w, importance, best, error, _refit(w, importance, best, fmt), fmt)
    return best


def _binary_start(w: torch.Tensor, importance: torch.Tensor, fmt: Format) -> Grid:
    """Two levels at the mean of the negative and of the positive weights."""
    if fmt.symmetric:
        mean = (importance * w.abs()).sum(-1) / importance.sum(-1).clamp(min=1e-30)
        return rounded(2 * mean, mean, fmt)
    levels = []
    for side in (-w.clamp(max=0), w.clamp(min=0)):
        mass = importance * (side > 0)
        levels.append((mass * side).sum(-1) / mass.sum(-1).clamp(min=1e-30))
    scale = levels[0] + levels[1]
    return rounded(scale, levels[0] * inverse(scale), fmt)


def _error(w: torch.Tensor, importance: torch.Tensor, grid: Grid, fmt: Format) -> torch.Tensor:
    codes = nearest_codes(w, grid, fmt.levels)
    difference = codes.sub_(grid.zero.unsqueeze(-1)).mul_(grid.scale.unsqueeze(-1)).sub_(w)
    return difference.square_().mul_(importance).sum(-1)


def _better(
    w: torch.Tensor, importance: torch.Tensor, best: Grid, error: torch.Tensor, grid: Grid, fmt: Format
) -> tuple[Grid, torch.Tensor]:
    """Group by group the better of two grids, and its error."""
    challenge = _error(w, importance, grid, fmt)
    wins = challenge < error
    scale, zero = torch.where(wins, grid.scale, best.scale), torch.where(wins, grid.zero, best.zero)
    return Grid(scale, zero), torch.where(wins, challenge, error)


def _refit(w: torch.Tensor, importance: torch.Tensor, grid: Grid, fmt: Format) -> Grid:
    """Weighted regression of the weights on their codes; the zero is rounded before the scale is fitted."""
    codes = nearest_codes(w, grid, fmt.levels)
    if not fmt.symmetric:
        mass = importance.sum(-1).clamp(min=1e-30)
        mean_code, mean_w = (importance * codes).sum(-1) / mass, (importance * w).sum(-1) / mass
        centered = codes - mean_code.unsqueeze(-1)
        weighted = importance * centered
        scale = (weighted * w).sum(-1) / (weighted * centered).sum(-1).clamp(min=1e-30)
        grid = rounded(scale, mean_code - mean_w * inverse(scale), fmt)
    offsets = codes - grid.zero.unsqueeze(-1)
    weighted = importance * offsets
    scale = (weighted * w).sum(-1) / (weighted * offsets).sum(-1).clamp(min=1e-30)
    return rounded(scale, grid.zero, fmt)


def to_groups(values: torch.Tensor, group: int) -> torch.Tensor:
    """``[..., K]`` to ``[..., G, group]``; a short last group is padded with 0."""
    columns = values.shape[-1]
    padded = functional.pad(values, (0, -columns % group))
    return padded.reshape(*values.shape[:-1], -(-columns // group), group)
