"""Random codes that a format can store."""

from __future__ import annotations

import torch

from moqc.quant import trellis
from moqc.quant.formats import ROW_TILE, Format


def random_codes(fmt: Format, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Codes uint8 of `shape` ``[..., rows, columns]``; those of a trellis format follow its trellis."""
    if not fmt.trellis:
        return torch.randint(0, fmt.levels, shape, generator=generator, dtype=torch.uint8)
    *lead, rows, columns = shape
    padded = (*lead, -(-rows // ROW_TILE) * ROW_TILE, columns)
    stored = torch.randint(0, 1 << fmt.bits, padded, generator=generator, dtype=torch.uint8)
    return trellis.decode(stored)[..., :rows, :].contiguous()
