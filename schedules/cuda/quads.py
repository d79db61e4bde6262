"""Plans of the int8 decode kernels for 2 and more tokens (``quad_blocks.cu``); no TVM here.

As with `rows.RowsPlan`, warps own rows and a block's activations lie in shared memory; but they are integers
of 16 bits, which decodes four codes with one mask (``quads.cu``), and there are no lists of slots.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Self

from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.plan import COLUMN_TOKENS, LARGE_ROWS, MULTIPROCESSORS, ExpertsShape, divisors
from moqc.schedules.cuda.rows import RunsPlan

MOST_TOKENS = 181
"""Up to which they are used: each of their blocks reads all of the router's ids."""
FEW = 4
"""Tokens an expert, up to which they were faster than slots on an H200."""
SLICE_UNITS = 8
"""Most units of columns of a block of down."""
BLOCK_BYTES = 1024
"""Of a multiprocessor's shared memory that each block takes beside its own."""
IMAGE_BYTES = 2048
"""Of four tokens' activations and 256 columns, as operand B."""


def by_quads(format: Format) -> bool:
    """Whether these kernels have the format: what two words of its codes make is of one group."""
    whole = format.group == 128 or (format.group == 64 and format.bits in (2, 4, 8))
    return whole and not format.trellis


@dataclass(frozen=True)
class QuadsPlan(RunsPlan):
    """Runs by int8, for 4 or 8 of an expert's tokens at a time.

    All blocks run at once, `blocks` on each multiprocessor, and have equally much (``quad_shares.cu``): up to
    `pairs` pairs of row tiles at a time, twice as many where experts have no more than 4 tokens.
    """

    kind: ClassVar[str] = "q"
    blocks: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``w8p6u8k2d2q8b2``; the inverse of `str`."""
        match = re.fullmatch(r"w(\d+)p(\d+)u(\d+)k(\d+)d(\d+)q(\d+)b(\d+)", text)
        if match is None:
            raise InternalError(f"no plan: {text!r}")
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return f"{super().__str__()}b{self.blocks}"

    @property
    def cpp(self) -> str:
        """Its C++ type."""
        numbers = self.warps, self.pairs, self.units, self.split, self.depth, self.tokens, self.blocks
        return f"moqc::quads::Plan<{', '.join(map(str, numbers))}>"

    @property
    def grid(self) -> int:
        """Blocks of a launch."""
        return MULTIPROCESSORS * self.blocks

    def check(self, columns: int, whole: bool, formats: Sequence[Format]) -> None:
        """InternalError unless it can cut `columns` columns of `formats`; `whole`: a block takes all."""
        units = -(-columns // COLUMNS)
        cut = units == self.units if whole else units % self.units == 0
        even = self.units % (self.split * self.depth) == 0
        if not (cut and even) or self.tokens not in (4, 8) or self.warps > 32:
            raise InternalError(f"plan {self} does not fit {units} units of columns")
        if not all(map(by_quads, formats)):
            raise InternalError(f"plan {self}: no kernel for one of {', '.join(map(str, formats))}")


def quads_bytes(
    plan: QuadsPlan, projections: int, formats: Sequence[Format], pairs: int, experts: int
) -> int:
    """Shared memory of a block.

    What it finds out from the router's `pairs`, the tokens' weights, results that meet, and the activations,
    of two formats where gate and up may have different ones.
    """
    choices = -(-(128 * -(-experts // 32) + 4 * plan.tokens + 2 * pairs) // 16) * 16
    unit = IMAGE_BYTES + 16 + 48 * max(COLUMNS // fmt.group for fmt in formats)
    kinds = 2 if projections == 2 and len(set(formats)) > 1 else 1
    results = projections * plan.pairs * plan.split * 2 * ROWS * 8 * 4
    return choices + 4 * plan.tokens + results + kinds * plan.tokens // 4 * plan.units * unit


def most_pairs(hit: float, rows: int, slices: int, blocks: int) -> int:
    """The least ``QuadsPlan.pairs`` for a share of `hit` experts' `rows` rows, of 4 tokens each."""
    return max(1, math.ceil(hit * -(-rows // (2 * ROWS)) * slices / (2 * MULTIPROCESSORS * blocks)))


def fits(plan: QuadsPlan, needed: int, shared: int) -> bool:
    """Whether `plan.blocks` blocks of `needed` bytes fit a multiprocessor whose blocks may have `shared`."""
    return plan.blocks * (needed + BLOCK_BYTES) <= shared + BLOCK_BYTES


def quads_rules(shape: ExpertsShape, shared: int) -> tuple[QuadsPlan, QuadsPlan] | None:
    """Plans of both products for up to 8 tokens, as they were fastest on an H200, if there are any.

    A multiprocessor has one block of 16 warps where experts are large, else two of 8.
    """
    share, (fmt, *others) = shape.top_k / shape.experts, (*shape.gate, *shape.up, *shape.down)
    if COLUMN_TOKENS * share > FEW or not by_quads(fmt):
        return None
    large = -(-shape.intermediate // ROWS) >= LARGE_ROWS
    if fmt.bits >= (4 if large else 5) or any(other != fmt for other in others):
        return None  # bound by their bytes; several formats are more code than caches hold
    hit, wanted = min(shape.experts, COLUMN_TOKENS * shape.top_k), 1 if large else 2
    first, second = -(-shape.hidden // COLUMNS), -(-shape.intermediate // COLUMNS)
    slice_units = max(each for each in divisors(second) if each <= SLICE_UNITS) if large else second

    def fitting(rows: int, units: int, slices: int, matrices: int) -> QuadsPlan | None:
        for blocks, tokens, split in product(range(wanted, 0, -1), (8, 4), (4, 3, 2, 1)):
            pairs = most_pairs(hit, rows, slices, blocks)
            depth = 2 if fmt.bits <= 2 and units % (2 * split) == 0 else 1
            plan = QuadsPlan(16 // wanted, pairs, units, split, depth, tokens, blocks)
            needed = quads_bytes(plan, matrices, (fmt,), MOST_TOKENS * shape.top_k, shape.experts)
            if units % split == 0 and fits(plan, needed, shared):
                return plan
        return None

    matrices = 2 if shape.gate else 1
    gate_up = fitting(shape.intermediate, first, 1, matrices)
    down = fitting(shape.hidden, slice_units, second // slice_units, 1)
    return None if gate_up is None or down is None else (gate_up, down)
