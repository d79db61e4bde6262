"""How keys and values of past tokens are stored: a dtype, and for int8 the scales that go with the codes.

A row is one head's key or value of one token. In float32 and float16 it is stored as it is. In int8 every
`GROUP` columns (the last group may be short) share a float16 scale ``max|x| / 127``, codes are rounded half
to even, and the row's scales follow its codes, two bytes each.
"""

from __future__ import annotations

DTYPES = ("float16", "int8", "float32")
GROUP = 32
_BYTES = {"float32": 4, "float16": 2, "int8": 1}


def groups(width: int) -> int:
    """Number of scales of an int8 row of `width` columns."""
    return -(-width // GROUP)


def stored_columns(dtype: str, width: int) -> int:
    """Elements of `dtype` that a row of `width` columns takes."""
    return width + 2 * groups(width) if dtype == "int8" else width


def stored_bytes(dtype: str, width: int) -> int:
    """Bytes of a row."""
    return _BYTES[dtype] * stored_columns(dtype, width)
