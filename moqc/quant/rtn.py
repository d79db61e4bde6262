"""Round to nearest: every weight on its own, on grids found by clip search or spanning min to max."""

from __future__ import annotations

from typing import Literal

import torch

from moqc.quant import grid, trellis
from moqc.quant.formats import Format
from moqc.quant.tensor import Quantized, expand_groups

TRELLIS_REACH = {1: 1.2, 2: 1.85, 3: 2.45}
"""Outermost level of trellis formats in standard deviations: the best for Gaussian weights."""
TRELLIS_REFITS = 3
"""Rounds of codes and scales, in turn, in trellis formats."""


def quantize_rtn(
    w: torch.Tensor,
    fmt: Format,
    *,
    importance: torch.Tensor | None = None,
    clip: Literal["search", "minmax"] = "search",
) -> Quantized:
    """Quantize matrices ``w[..., N, K]``.

    Args:
        w: weights, any float dtype.
        fmt: the format.
        importance: what a squared error costs by column, ``[..., K]``: the diagonal of the Hessian. None, or
            all zeros: every column costs the same. Only the clip search uses it.
        clip: ``"search"`` minimises each group's error over scale and zero; ``"minmax"`` spans its range.

    """
    w = w.float()
    if clip == "minmax":
        found = grid.spanning(grid.to_groups(w, fmt.group).reshape(-1, fmt.group), fmt)
    else:
        found = find_grid(w, importance, fmt)
    return assemble(nearest_values(w, found, fmt), found, fmt)


def find_grid(w: torch.Tensor, importance: torch.Tensor | None, fmt: Format) -> grid.Grid:
    """Grids of all groups of ``w[..., N, K]`` float32, flat, that make the weighted squared error small.

    `importance`: ``[..., K]``, as `quantize_rtn` takes it.
    """
    flat = grid.to_groups(w, fmt.group).reshape(-1, fmt.group)
    weights = importance_groups(w, importance, fmt)
    if not fmt.trellis:
        return grid.search(flat, weights, fmt)
    # Rows of a tile are coupled, so no group can be searched alone: alternate codes and scales instead.
    mean_square = (weights * flat.square()).sum(-1) / weights.sum(-1).clamp(min=1e-30)
    middle = torch.full_like(mean_square, fmt.symmetric_zero)
    found = grid.rounded(mean_square.sqrt() * (TRELLIS_REACH[fmt.bits] / fmt.symmetric_zero), middle, fmt)
    for _ in range(TRELLIS_REFITS):
        offsets = grid.to_groups(nearest_values(w, found, fmt) - fmt.symmetric_zero, fmt.group)
        offsets = offsets.reshape(-1, fmt.group)
        weighted = weights * offsets
        scale = (weighted * flat).sum(-1) / (weighted * offsets).sum(-1).clamp(min=1e-30)
        found = grid.rounded(scale, middle, fmt)
    return found


def nearest_values(w: torch.Tensor, found: grid.Grid, fmt: Format) -> torch.Tensor:
    """The storable values nearest to ``w[..., N, K]`` on the flat grids of its groups, as float32."""
    shape = (*w.shape[:-1], fmt.groups(w.shape[-1]))
    scale, zero = (
        expand_groups(part.reshape(shape), fmt.group, w.shape[-1]) for part in (found.scale, found.zero)
    )
    targets = (w * grid.inverse(scale)).add_(zero)
    return project(targets.mT, scale.mT, fmt).mT


def project(targets: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """The storable values nearest to `targets` ``[..., N]``, N over rows whose scales are `scale`."""
    if fmt.trellis:
        return trellis.nearest(targets, scale.square(), fmt.values)
    return targets.round().clamp_(0, fmt.levels - 1)


def importance_groups(w: torch.Tensor, importance: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """Importance ``[..., K]`` of the columns of ``w[..., N, K]`` as rows of groups ``[M, group]``."""
    columns = torch.ones(w.shape[-1], device=w.device)
    if importance is not None:
        importance = importance.float()
        columns = torch.where(importance.amax(-1, keepdim=True) > 0, importance, 1.0).unsqueeze(-2)
        # A column that never fires still gets a share: its group may hold no other.
        columns = columns + columns.mean(-1, keepdim=True) * 1e-4
    return grid.to_groups(columns.expand(w.shape), fmt.group).reshape(-1, fmt.group)


def assemble(values: torch.Tensor, found: grid.Grid, fmt: Format) -> Quantized:
    """Values float32 ``[..., N, K]`` that the format can store and their flat grids as a `Quantized`."""
    shape = (*values.shape[:-1], fmt.groups(values.shape[-1]))
    codes = values.to(torch.uint8)
    if fmt.trellis:
        table = torch.tensor(fmt.values, dtype=torch.uint8, device=values.device)
        codes = torch.searchsorted(table, codes.contiguous()).to(torch.uint8)
    zeros = None if fmt.symmetric else (found.zero / fmt.zero_step).round().to(torch.uint8).reshape(shape)
    return Quantized(fmt, codes.contiguous(), found.scale.half().reshape(shape), zeros)
