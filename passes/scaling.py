"""Measured numbers as the integers that annotations hold."""

from __future__ import annotations

from collections.abc import Iterable

NATS = 1e15
"""Costs in nats are annotated in units of 1e-15 nats."""
_MOST = 1 << 62
"""Annotations hold 64-bit integers."""


def to_integers(values: Iterable[float], scale: float) -> list[int]:
    """``round(value * scale)``; a value that is not zero stays at least 1 away from it."""
    return [_integer(value * scale) for value in values]


def _integer(value: float) -> int:
    rounded = max(-_MOST, min(round(value), _MOST))
    return rounded if rounded or not value else (1 if value > 0 else -1)
