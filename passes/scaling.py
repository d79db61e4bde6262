"""Measured numbers as the integers that annotations hold."""

from __future__ import annotations

from collections.abc import Iterable


def to_integers(values: Iterable[float], scale: float) -> list[int]:
    """``round(value * scale)``; a value that is not zero stays at least 1 away from it."""
    return [_integer(value * scale) for value in values]


def _integer(value: float) -> int:
    rounded = round(value)
    return rounded if rounded or not value else (1 if value > 0 else -1)
