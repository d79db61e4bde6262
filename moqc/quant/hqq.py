"""HQQ: zero points that make weight errors sparse, found without data.

Half-quadratic quantization (Badri and Shaji 2023, code: mobiusml/hqq, ``optimize_weights_proximal``):

    min over zero, error e:   ‖e‖_p + beta/2 ‖w - dequantized(zero) - e‖²

e by the shrinkage ``sign(x) relu(|x| - |x|^(p-1) / beta)``, zero as the mean of what e explains, in turn,
while beta grows and the mean error falls. The scale spans the group's range. The zero points found are
rounded to the bytes that are stored.
"""

from __future__ import annotations

import torch

from moqc.errors import UserError
from moqc.quant import grid
from moqc.quant.formats import Format
from moqc.quant.rtn import assemble, nearest_values
from moqc.quant.tensor import Quantized

NORM, BETA, KAPPA, ROUNDS = 0.7, 10.0, 1.01, 20
"""The original's constants: p, the first beta, its growth, and the most rounds."""


def quantize_hqq(w: torch.Tensor, fmt: Format) -> Quantized:
    """Quantize matrices ``w[..., N, K]``. Raises UserError for a format without zero points."""
    if fmt.symmetric:
        raise UserError(
            f"hqq chooses zero points, {fmt} has none: take an asymmetric format such as int3-g64"
        )
    w = w.float()
    groups = grid.to_groups(w, fmt.group).reshape(-1, fmt.group)
    valid = grid.to_groups(torch.ones_like(w), fmt.group).reshape(-1, fmt.group)
    start = grid.spanning(groups, fmt)
    zero = _zero_points(groups, valid, start, fmt)
    found = grid.rounded(start.scale, zero, fmt)
    return assemble(nearest_values(w, found, fmt), found, fmt)


def _zero_points(w: torch.Tensor, valid: torch.Tensor, start: grid.Grid, fmt: Format) -> torch.Tensor:
    """The zero points ``[M]`` of groups ``[M, group]``, of which `valid` (1 or 0) are weights."""
    scale, inverse = start.scale.unsqueeze(-1), grid.inverse(start.scale).unsqueeze(-1)
    zero, best, beta, least = start.zero, start.zero, BETA, float("inf")
    for _ in range(ROUNDS):
        codes = grid.nearest_codes(w, grid.Grid(start.scale, zero), fmt.levels)
        residual = w - scale * (codes - zero.unsqueeze(-1))
        error = float((residual.abs() * valid).sum() / valid.sum())
        if error >= least:
            break
        best, least = zero, error
        magnitude = residual.abs()
        shrunk = residual.sign() * (magnitude - magnitude.clamp(min=1e-12) ** (NORM - 1) / beta).clamp(min=0)
        explained = (codes - (w - shrunk) * inverse) * valid
        zero = explained.sum(-1) / valid.sum(-1).clamp(min=1)
        beta *= KAPPA
    return best
