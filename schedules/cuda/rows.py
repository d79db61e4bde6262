"""Plans of the decode kernels whose warps own rows (``rows.cu``); no TVM here.

`plan.Plan` keeps the activations of 256 columns in a warp's registers and adds up over warps; here they lie
in shared memory for the whole block, which leaves registers for more warps. Which is faster is a matter of
measurement: these plans come from records only.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS, field_bits
from moqc.schedules.cuda.plan import COLUMN_TOKENS


@dataclass(frozen=True)
class RunsPlan:
    """How a product is cut whose warps own rows.

    A block takes `pairs` pairs of row tiles (of each projection) and `units` units of one expert's columns. A
    *run* is a pair along the columns; `split` of them share the units. `warps` warps take the runs in turn,
    `depth` units of both row tiles ahead, for `tokens` of the expert's tokens at a time.
    """

    kind: ClassVar[str]
    """The letter of `tokens` in the plan's text."""
    warps: int
    pairs: int
    units: int
    split: int
    depth: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``w28p28u16k1d1m8``; the inverse of `str`."""
        match = re.fullmatch(rf"w(\d+)p(\d+)u(\d+)k(\d+)d(\d+){cls.kind}(\d+)", text)
        if match is None:
            raise InternalError(f"no plan: {text!r}")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"w{self.warps}p{self.pairs}u{self.units}k{self.split}d{self.depth}{self.kind}{self.tokens}"


@dataclass(frozen=True)
class RowsPlan(RunsPlan):
    """Runs over one expert's slot, or over a tile of ``tokens // 8`` slots: `tokens` are 8 a slot."""

    kind: ClassVar[str] = "m"

    @property
    def slots(self) -> int:
        """Slots of a block's tile."""
        return self.tokens // COLUMN_TOKENS

    def groups(self, rows: int) -> int:
        """Blocks that `rows` rows of a matrix take."""
        return -(-rows // (2 * ROWS * self.pairs))

    def check(self, columns: int, whole: bool) -> None:
        """InternalError unless it can cut `columns` columns; `whole`: a block takes all of them."""
        units = -(-columns // COLUMNS)
        cut = units == self.units if whole else units % self.units == 0
        if not cut or self.units % self.split or (self.slots > 1 and self.split > 1) or self.warps > 32:
            raise InternalError(f"plan {self} does not fit {units} units of columns")


def rows_bytes(plan: RowsPlan, projections: int, formats: Sequence[Format]) -> int:
    """Shared memory of a block: the tokens' factors, results that meet there, and the activations."""
    wide = any(field_bits(fmt) == 1 for fmt in formats)
    unit = (64 if wide else 32) * 128 + max(COLUMNS // fmt.group for fmt in formats) * 32
    kinds = 2 if projections == 2 and len(set(formats)) > 1 else 1  # gate's and up's format may differ
    results = projections * plan.pairs * plan.split * 2 * ROWS * plan.tokens * 4 if plan.slots == 1 else 0
    return 32 * plan.slots + results + kinds * plan.slots * plan.units * unit
