"""Levels of the trellis formats: Lloyd's iteration on Gaussian weights, `moqc.quant.formats.TRELLIS_VALUES`.

    python benchmarks/trellis_levels.py

Prints for each width the levels that minimise the squared error under the trellis, in standard deviations
and on the integer grid that is stored, with the error of both.
"""

from __future__ import annotations

import torch

from moqc.quant.formats import TRELLIS_VALUES
from moqc.quant.rtn import TRELLIS_REACH
from moqc.quant.trellis import nearest

CIRCLES, ROUNDS = 8000, 20


def error(weights: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The nearest sequences of `levels` and their mean squared error."""
    found = nearest(weights, torch.ones_like(weights), levels.tolist())
    return found, float((found - weights).square().mean())


def main() -> None:
    """Train and print."""
    weights = torch.randn(CIRCLES, 16, generator=torch.Generator().manual_seed(0))
    fresh = torch.randn(CIRCLES, 16, generator=torch.Generator().manual_seed(1))
    for bits, values in TRELLIS_VALUES.items():
        stored = torch.tensor(values, dtype=torch.float32)
        stored = (stored / stored[-1] * 2 - 1) * TRELLIS_REACH[bits]
        levels = stored.clone()
        for _ in range(ROUNDS):
            found, _ = error(weights, levels)
            means = torch.stack([weights[found == level].mean() for level in levels])
            levels = (means - means.flip(0)) / 2
        text = " ".join(f"{level:.3f}" for level in levels[len(levels) // 2 :].tolist())
        print(f"{bits} bits: +-({text}), error {error(fresh, levels)[1]:.4f};")
        print(f"        stored as {values}, error {error(fresh, stored)[1]:.4f}")


if __name__ == "__main__":
    main()
