"""Bytes, seconds, shares and lists as people write and read them."""

from __future__ import annotations

import re

from moqc.errors import UserError

_BYTES = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _BYTES |= {f"{_prefix}b": 1000**_power, f"{_prefix}ib": 1024**_power}
_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-zµ]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """``6GiB``, ``6GB``, ``500 MB`` or a number of bytes; UserError for anything else."""
    return int(_parse(text, _BYTES, "bytes such as 6GiB or 500MB"))


def parse_seconds(text: str) -> float:
    """``25ms`` or ``0.1s``; UserError for anything else."""
    return _parse(text, _SECONDS, "a time such as 25ms or 0.1s")


def parse_share(text: str) -> float:
    """``15%`` or ``0.15``; UserError for anything that is not above 0 and below 1."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f"{text!r}: expected a share above 0 and below 1, such as 15% or 0.15")
    return share


def split_shares(value: str) -> tuple[float, ...]:
    """Shares of a comma-separated list, each as `parse_share` reads it."""
    return tuple(parse_share(item) for item in split(value))


def split(value: str) -> tuple[str, ...]:
    """Items of a comma-separated list; UserError when one is empty."""
    items = tuple(item.strip() for item in value.split(",")) if value.strip() else ()
    if not all(items):
        raise UserError(f"{value!r}: an item of the list is empty")
    return items


def split_numbers(value: str) -> tuple[float, ...]:
    """Numbers of a comma-separated list."""
    try:
        return tuple(float(item) for item in split(value))
    except ValueError as error:
        raise UserError(f"{value!r}: expected numbers separated by commas, such as 2.5,3.25") from error


def split_integers(value: str) -> tuple[int, ...]:
    """Integers of a comma-separated list."""
    try:
        return tuple(int(item) for item in split(value))
    except ValueError as error:
        raise UserError(f"{value!r}: expected integers separated by commas, such as 0,1,2") from error


def _parse(text: str, units: dict[str, float] | dict[str, int], what: str) -> float:
    match = _QUANTITY.fullmatch(text)
    unit = match[2].lower() if match else ""
    if match is None or unit not in units or float(match[1]) <= 0:
        raise UserError(f"{text!r}: expected {what}")
    return float(match[1]) * units[unit]


def bytes_text(count: float) -> str:
    """Three digits and a binary unit: ``4.31 GiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def count_text(count: float) -> str:
    """Three digits and M or B: ``30.5 B``."""
    return f"{count / 1e9:.3g} B" if count >= 1e9 else f"{count / 1e6:.3g} M"


def seconds_text(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``8 min`` or ``2.5 h``."""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
