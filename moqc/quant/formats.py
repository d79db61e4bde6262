"""Formats of a quantized matrix, and what one costs in stored bits.

A matrix ``W[rows, columns]`` is cut along its columns into groups that share a scale (and a zero point):

    W[n, k]  ≈  scale[n, g] * (code[n, k] - zero[n, g]),    g = k // group

* ``code``: ``bits``-bit unsigned integer.
* ``scale``: float16.
* ``zero``: asymmetric formats store an unsigned byte ``z``; the zero point is ``z * (levels - 1) / 255``: it
  has a resolution of 1/255 of the code range and is not confined to whole codes.
  Symmetric formats store none; the zero point is ``symmetric_zero``.

The last group of a matrix may be short; columns are padded to a multiple of `COLUMN_TILE` and rows to
`ROW_TILE` when packed, and the padding is counted in the stored size.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moqc.errors import UserError

ROW_TILE = 16
COLUMN_TILE = 32
BITS = (1, 2, 3, 4, 8)
SIMULATED_BITS = (6,)
"""Widths without a kernel, of published methods: `moqc compare` evaluates them, nothing compiles them."""
GROUPS = (32, 64, 128)

_NAME = re.compile(r"int(?P<bits>\d+)-g(?P<group>\d+)(?P<symmetric>-sym)?")


@dataclass(frozen=True, slots=True, order=True)
class Format:
    """How one matrix is stored: code width in bits, columns a group, symmetric or not."""

    bits: int
    group: int = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*BITS, *SIMULATED_BITS) or self.group not in GROUPS:
            raise UserError(f"no format {self}: bits are one of {BITS}, groups one of {GROUPS}")

    @classmethod
    def parse(cls, name: str) -> Format:
        """Read a name such as ``int3-g64`` or ``int4-g128-sym``; the inverse of `str`."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(f"unknown format {name!r}: expected for example int3-g64 or int4-g128-sym")
        return cls(int(match["bits"]), int(match["group"]), match["symmetric"] is not None)

    def __str__(self) -> str:
        return f"int{self.bits}-g{self.group}{'-sym' if self.symmetric else ''}"

    @property
    def simulated(self) -> bool:
        """Whether no kernel reads this format."""
        return self.bits in SIMULATED_BITS

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return 1 << self.bits

    @property
    def symmetric_zero(self) -> float:
        """Zero point of a symmetric format, in codes: the middle for 1 and 2 bits, else a whole code."""
        return (self.levels - 1) / 2 if self.bits <= 2 else self.levels / 2

    @property
    def zero_step(self) -> float:
        """Codes per unit of the stored zero byte."""
        return (self.levels - 1) / 255

    def groups(self, columns: int) -> int:
        """Number of groups in a row of `columns` weights; the last may be short."""
        return -(-columns // self.group)

    def stored_bits(self, rows: int, columns: int) -> int:
        """Bits a packed matrix occupies: codes, scales, zeros and the padding of both axes."""
        rows = -(-rows // ROW_TILE) * ROW_TILE
        padded = -(-columns // COLUMN_TILE) * COLUMN_TILE
        overhead = 16 if self.symmetric else 24
        return rows * (padded * self.bits + self.groups(columns) * overhead)
