"""Round to nearest: every weight on its own, on grids found by clip search or spanning min to max."""

from __future__ import annotations

from typing import Literal

import torch

from moqc.quant import grid
from moqc.quant.formats import Format
from moqc.quant.tensor import Quantized


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
    groups = grid.to_groups(w.float(), fmt.group)
    flat = groups.reshape(-1, fmt.group)
    if clip == "minmax":
        found = grid.spanning(flat, fmt)
    else:
        found = grid.search(flat, importance_groups(w, importance, fmt), fmt)
    codes = grid.nearest_codes(flat, found, fmt.levels).to(torch.uint8)
    return assemble(codes.reshape(*w.shape[:-1], -1)[..., : w.shape[-1]], found, fmt)


def importance_groups(w: torch.Tensor, importance: torch.Tensor | None, fmt: Format) -> torch.Tensor:
    """Importance ``[..., K]`` of the columns of ``w[..., N, K]`` as rows of groups ``[M, group]``."""
    columns = torch.ones(w.shape[-1], device=w.device)
    if importance is not None:
        importance = importance.float()
        columns = torch.where(importance.amax(-1, keepdim=True) > 0, importance, 1.0).unsqueeze(-2)
        # A column that never fires still gets a share: its group may hold no other.
        columns = columns + columns.mean(-1, keepdim=True) * 1e-4
    return grid.to_groups(columns.expand(w.shape), fmt.group).reshape(-1, fmt.group)


def assemble(codes: torch.Tensor, found: grid.Grid, fmt: Format) -> Quantized:
    """Codes uint8 ``[..., N, K]`` and their flat grids as a `Quantized`."""
    shape = (*codes.shape[:-1], fmt.groups(codes.shape[-1]))
    zeros = None if fmt.symmetric else (found.zero / fmt.zero_step).round().to(torch.uint8).reshape(shape)
    return Quantized(fmt, codes.contiguous(), found.scale.half().reshape(shape), zeros)
