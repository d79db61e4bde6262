"""Input channels with more bits than the rest of their matrix: kept twice, the second time as what is left.

A protected channel of ``W[N, K]`` gets copies at the end of the row, each for the rounding error of what came
before: ``W x = W' x'``, W' [N, K + n * copies], with ``x' = (x, x[channels], ...)``. All columns are of one
format, so kernels stay dense; b bits become ``b (1 + copies)`` for a protected channel (outlier channel
splitting, arXiv 1901.09504, with residuals in the place of halves).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moqc.quant.formats import COLUMN_TILE, Format
from moqc.quant.rtn import quantize_rtn


def swing(energy: torch.Tensor) -> torch.Tensor:
    """How much a channel's share of a dataset's energy differs between datasets: ``[D, K]`` -> ``[K]``.

    The difference between its largest and its smallest share, after MoQa (arXiv 2503.21135), which leaves
    the statistic open.
    """
    shares = energy / energy.sum(-1, keepdim=True).clamp(min=1e-30)
    return shares.amax(0) - shares.amin(0)


@dataclass(frozen=True)
class Protection:
    """The protected `channels` of a block's input, and how many `copies` each has."""

    channels: tuple[int, ...]
    copies: int = 1

    @classmethod
    def choose(cls, scores: torch.Tensor, share: float, copies: int) -> Protection:
        """The channels of largest score ``[K]``: at least `share` of all, and whole tiles of copies."""
        step = COLUMN_TILE // math.gcd(COLUMN_TILE, copies)
        wanted = math.ceil(math.ceil(share * len(scores)) / step) * step
        return cls(tuple(sorted(scores.topk(min(wanted, len(scores))).indices.tolist())), copies)

    @property
    def added(self) -> list[int]:
        """What the columns that are added read."""
        return [*self.channels] * self.copies

    def extend(self, x: torch.Tensor) -> torch.Tensor:
        """``x' [..., K + added]`` of inputs ``x[..., K]``."""
        return torch.cat([x, x[..., self.added]], dim=-1)

    def moments(self, moments: torch.Tensor) -> torch.Tensor:
        """Second moments of x' from those of x, ``[..., K, K]``."""
        return self.extend(self.extend(moments).mT).mT

    def split(self, w: torch.Tensor, fmt: Format) -> torch.Tensor:
        """``W' [..., N, K + added]``, float32: a copy is for what rounding to `fmt` leaves before it."""
        channels = list(self.channels)
        parts = [w.float().clone()]
        for _ in range(self.copies):
            at = channels if len(parts) == 1 else slice(None)
            left = (parts[-1] - quantize_rtn(parts[-1], fmt).dequantize())[..., at]
            parts[-1][..., at] -= left
            parts.append(left)
        return torch.cat(parts, dim=-1)
