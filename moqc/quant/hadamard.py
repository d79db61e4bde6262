"""Rotation of vectors by a Hadamard matrix, in blocks of 32 columns.

``x[..., K]`` becomes ``x R``, R block diagonal with ``H / sqrt(32)``, H Sylvester's matrix of 32 rows; what
is left over of K stays. R is symmetric and orthogonal, so it is its own inverse, and ``down x = (down R) (R
x)``: large weights and large channels are spread over 32 columns, where a grid covers them better (QuaRot,
arXiv 2404.00456, whose rotation before down spans all columns).
"""

from __future__ import annotations

import functools
import math

import torch

BLOCK = 32
"""Columns rotated together: a tile of the kernels, within a group of int8 activations."""


@functools.cache
def _matrix() -> torch.Tensor:
    found = torch.ones(1, 1)
    while len(found) < BLOCK:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found / math.sqrt(BLOCK)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """``x R`` for float32 ``x[..., K]``; the last ``K % 32`` columns stay as they are. Its own inverse."""
    whole = x.shape[-1] // BLOCK * BLOCK
    blocks = x[..., :whole].reshape(*x.shape[:-1], -1, BLOCK) @ _matrix().to(x.device)
    return torch.cat([blocks.flatten(-2), x[..., whole:]], dim=-1)


def rotate_moments(moments: torch.Tensor) -> torch.Tensor:
    """``R M R`` for symmetric float32 ``M[..., K, K]``: second moments of the rotated vectors."""
    return rotate(rotate(moments).mT)
