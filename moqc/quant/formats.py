"""Formats of a quantized matrix, and what one costs in stored bits.

A matrix ``W[rows, columns]`` is cut along its columns into groups that share a scale (and a zero point):

    W[n, k]  ≈  scale[n, g] * (value(code[n, k]) - zero[n, g]),    g = k // group

* ``code``: unsigned integer below ``levels``. In ``int`` formats it takes ``bits`` bits and is its own value.
  In ``tcq`` formats it has one bit more than is stored: a trellis through the 16 rows of a tile allows half
  of the levels at a time (`moqc.quant.trellis`), and ``values`` lists what the codes stand for.
* ``scale``: float16; with ``byte_scales`` the upper eight bits of one that is not negative (5 exponent and
  3 mantissa bits).
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
ACTIVATION_GROUP = 128
"""Columns of int8 activations that share a scale; a multiple of `COLUMN_TILE`."""
BITS = (1, 2, 3, 4, 8)
SIMULATED_BITS = (6,)
"""Widths without a kernel, of published methods: `moqc compare` evaluates them, nothing compiles them."""
GROUPS = (32, 64, 128)
TRELLIS_VALUES: dict[int, tuple[int, ...]] = {
    1: (0, 1, 2, 3),
    2: (0, 3, 5, 7, 8, 10, 12, 15),
    3: (0, 9, 14, 18, 21, 25, 27, 30, 33, 36, 38, 42, 45, 49, 54, 63),
}
"""Values of the codes of trellis formats by bits: the levels that minimise the squared error of Gaussian
weights under the trellis (Lloyd's iteration), on a grid of integers; those of 2 bits fit 4, as some dot
products want (`benchmarks/trellis_levels.py`)."""

_NAME = re.compile(r"int(?P<bits>\d+)-g(?P<group>\d+)(?P<symmetric>-sym)?(?P<bytes>-s8)?")
_TRELLIS = re.compile(r"tcq(?P<bits>\d+)-g(?P<group>\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Format:
    """How one matrix is stored: bits a code, columns a group, symmetric or not, kind of scales and codes."""

    bits: int
    group: int = 64
    symmetric: bool = False
    byte_scales: bool = False
    trellis: bool = False

    def __post_init__(self) -> None:
        if self.bits not in (*BITS, *SIMULATED_BITS) or self.group not in GROUPS:
            raise UserError(f"no format {self}: bits are one of {BITS}, groups one of {GROUPS}")
        if self.trellis and self.bits not in TRELLIS_VALUES:
            raise UserError(f"no format {self}: trellis formats have {min(TRELLIS_VALUES)} to 3 bits")
        if self.trellis and not (self.symmetric and self.byte_scales):
            raise UserError(f"no format {self}: trellis formats are symmetric with byte scales")

    @classmethod
    def parse(cls, name: str) -> Format:
        """Read a name such as ``int3-g64``, ``int4-g128-sym-s8`` or ``tcq2-g64``; the inverse of `str`."""
        if match := _TRELLIS.fullmatch(name):
            return cls.tcq(int(match["bits"]), int(match["group"]))
        match = _NAME.fullmatch(name)
        if match is None:
            raise UserError(
                f"unknown format {name!r}: expected for example int3-g64, int4-g128-sym-s8 or tcq2-g64"
            )
        symmetric, byte_scales = match["symmetric"] is not None, match["bytes"] is not None
        return cls(int(match["bits"]), int(match["group"]), symmetric, byte_scales)

    @classmethod
    def tcq(cls, bits: int, group: int) -> Format:
        """The trellis format of so many bits."""
        return cls(bits, group, symmetric=True, byte_scales=True, trellis=True)

    def __str__(self) -> str:
        if self.trellis:
            return f"tcq{self.bits}-g{self.group}"
        suffix = ("-sym" if self.symmetric else "") + ("-s8" if self.byte_scales else "")
        return f"int{self.bits}-g{self.group}{suffix}"

    @property
    def simulated(self) -> bool:
        """Whether no kernel reads this format."""
        return self.bits in SIMULATED_BITS

    @property
    def levels(self) -> int:
        """Number of distinct codes."""
        return 1 << self.bits + self.trellis

    @property
    def values(self) -> tuple[int, ...]:
        """What the codes stand for, ascending; ``value(code) = code`` in int formats."""
        return TRELLIS_VALUES[self.bits] if self.trellis else tuple(range(self.levels))

    @property
    def wide(self) -> bool:
        """Whether values exceed 4 bits."""
        return self.values[-1] > 15

    @property
    def symmetric_zero(self) -> float:
        """Zero point of a symmetric format, in values: the middle, or a whole code where scales have a sign.

        A negative scale can then choose the side on which codes reach one step further.
        """
        whole = self.bits > 2 and not self.byte_scales
        return self.levels / 2 if whole else self.values[-1] / 2

    @property
    def centre(self) -> tuple[int, int] | None:
        """(factor, offset) with ``factor * (value - zero point) = factor * value - offset`` an int8.

        None where there is none for every value: asymmetric formats, and 8 bits around 127.5.
        """
        factor = 1 if self.symmetric_zero.is_integer() else 2
        offset = int(factor * self.symmetric_zero)
        fits = self.symmetric and offset <= 128 and factor * self.values[-1] - offset <= 127
        return (factor, offset) if fits else None

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
        overhead = (8 if self.byte_scales else 16) + (0 if self.symmetric else 8)
        return rows * (padded * self.bits + self.groups(columns) * overhead)


ALL_FORMATS = (
    *(
        Format(bits, group, symmetric, byte_scales)
        for bits in BITS
        for group in GROUPS
        for symmetric in (False, True)
        for byte_scales in (False, True)
    ),
    *(Format.tcq(bits, group) for bits in TRELLIS_VALUES for group in GROUPS),
)
"""Every format there is."""
