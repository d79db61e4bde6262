"""The loops of GPTQ and descent that go column after column, of one block of columns.

Matrices are stored by columns, ``[B, K, N]``; every row of every matrix is on its own here (in trellis
formats: every tile of rows). On a GPU with Triton a block is one launch in place of some ten a column.
"""

from __future__ import annotations

import functools
import importlib.util

import torch

from moqc.quant import grid
from moqc.quant.formats import Format
from moqc.quant.rtn import project


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fused(tensor: torch.Tensor, fmt: Format) -> bool:
    """Whether the kernels of `moqc.quant.columns_triton` do it."""
    return tensor.is_cuda and not fmt.trellis and _has_triton()


def propagate(
    w: torch.Tensor, factor: torch.Tensor, levels: grid.Grid, fmt: Format
) -> tuple[torch.Tensor, torch.Tensor]:
    """GPTQ on a block of J columns: storable values and errors, ``[B, J, N]`` both.

    Args:
        w: what the columns should be, ``[B, J, N]``. May be overwritten.
        factor: upper triangular, ``[B, J, J]``; the error of a column, times its row, goes to those after it.
        levels: a grid a column and row of the matrix, ``[B, J, N]``.
        fmt: the format.

    """
    if _fused(w, fmt):
        from moqc.quant import columns_triton

        return columns_triton.propagate(w, factor, levels.scale, levels.zero, fmt.levels)
    values, errors, inverse = torch.empty_like(w), torch.empty_like(w), grid.inverse(levels.scale)
    for j in range(w.shape[1]):
        value = project((w[:, j] * inverse[:, j]).add_(levels.zero[:, j]), levels.scale[:, j], fmt)
        values[:, j] = value
        error = (w[:, j] - levels.scale[:, j] * (value - levels.zero[:, j])) / factor[:, j, j, None]
        errors[:, j] = error
        w[:, j + 1 :].addcmul_(factor[:, j, j + 1 :, None], error.unsqueeze(1), value=-1)
    return values, errors


def move(
    values: torch.Tensor,
    residual: torch.Tensor,
    gradient: torch.Tensor,
    own: torch.Tensor,
    scale: torch.Tensor,
    fmt: Format,
) -> None:
    """Coordinate descent over a group of J columns: every value to the nearest level of its own optimum.

    Args:
        values: of the group, ``[B, J, N]``; changed in place.
        residual: weights less what the values stand for, ``[B, J, N]``; changed in place.
        gradient: ``H[group] @ residual`` of all columns, ``[B, J, N]``; overwritten.
        own: the group's part of the Hessian, ``[B, J, J]``.
        scale: of the group, ``[B, N]``.
        fmt: the format.

    """
    if _fused(values, fmt):
        from moqc.quant import columns_triton

        columns_triton.move(values, residual, gradient, own, scale, fmt.levels)
        return
    inverse = grid.inverse(scale)
    for j in range(values.shape[1]):
        value = values[:, j]
        new = project(value + gradient[:, j] / own[:, j, j, None] * inverse, scale, fmt)
        change = (new - value) * scale
        values[:, j] = new
        residual[:, j] -= change
        gradient[:, j + 1 :].addcmul_(own[:, j, j + 1 :, None], change.unsqueeze(1), value=-1)
