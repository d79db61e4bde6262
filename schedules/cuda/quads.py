"""Plans of the int8 decode kernels for 2 and more tokens (``quad_blocks.cu``); no TVM here.

As with `rows.RowsPlan`, warps own rows and a block's activations lie in shared memory; but they are integers
of 16 bits, which decodes four codes with one mask (``quads.cu``), and there are no lists of slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.plan import COLUMN_TOKENS, LARGE_ROWS, MULTIPROCESSORS, ExpertsShape, divisors
from moqc.schedules.cuda.rows import RunsPlan

MOST_TOKENS = 181
"""Up to which they are used: each of their blocks reads all of the router's ids."""
FEW = 4
"""Tokens an expert, up to which they were faster than slots on an H200."""
IMAGE_BYTES = 2048
"""Of four tokens' activations and 256 columns, as operand B."""


def by_quads(format: Format) -> bool:
    """Whether these kernels have the format: what two words of its codes make is of one group."""
    whole = format.group == 128 or (format.group == 64 and format.bits in (2, 4, 8))
    return whole and not format.trellis


@dataclass(frozen=True)
class QuadsPlan(RunsPlan):
    """Runs by int8, for 4 or 8 of an expert's tokens at a time."""

    kind: ClassVar[str] = "q"

    @property
    def cpp(self) -> str:
        """Its C++ type."""
        numbers = self.warps, self.pairs, self.units, self.split, self.depth, self.tokens
        return f"moqc::quads::Plan<{', '.join(map(str, numbers))}>"

    def check(self, columns: int, whole: bool, formats: Sequence[Format]) -> None:
        """InternalError unless it can cut `columns` columns of `formats`; `whole`: a block takes all."""
        units = -(-columns // COLUMNS)
        cut = units == self.units if whole else units % self.units == 0
        if not cut or self.units % self.split or self.tokens not in (4, 8) or self.warps > 32:
            raise InternalError(f"plan {self} does not fit {units} units of columns")
        if not all(map(by_quads, formats)):
            raise InternalError(f"plan {self}: no kernel for one of {', '.join(map(str, formats))}")


def quads_bytes(
    plan: QuadsPlan, projections: int, formats: Sequence[Format], pairs: int, experts: int
) -> int:
    """Shared memory of a block.

    Its expert's share of `pairs` of the router's and what finds it, the tokens' weights, results that meet,
    and the activations, of two formats where gate and up may have different ones.
    """
    members = -(-(4 * -(-experts // 32) + 4 + 2 * pairs) // 16) * 16
    unit = IMAGE_BYTES + 16 + 48 * max(COLUMNS // fmt.group for fmt in formats)
    kinds = 2 if projections == 2 and len(set(formats)) > 1 else 1
    results = projections * plan.pairs * plan.split * 2 * ROWS * 8 * 4
    return members + 4 * plan.tokens + results + kinds * plan.tokens // 4 * plan.units * unit


def quads_rules(shape: ExpertsShape, shared: int) -> tuple[QuadsPlan, QuadsPlan] | None:
    """Plans of both products for up to 8 tokens, as they were fastest on an H200, if there are any.

    One wave of blocks: of 16 warps, a multiprocessor each, where experts are large; else of 8, two each.
    """
    share, (fmt, *others) = shape.top_k / shape.experts, (*shape.gate, *shape.up, *shape.down)
    if COLUMN_TOKENS * share > FEW or not by_quads(fmt):
        return None
    large = -(-shape.intermediate // ROWS) >= LARGE_ROWS
    if fmt.bits >= 4 or any(other != fmt for other in others):
        return None  # four bits are bound by their bytes, several formats are more code than caches hold
    if fmt.bits == 3 and not fmt.symmetric and not large:
        return None  # slots were faster
    hit = shape.experts * (1 - (1 - share) ** COLUMN_TOKENS)
    warps, wave = (16, MULTIPROCESSORS) if large else (8, 2 * MULTIPROCESSORS)
    first, second = -(-shape.hidden // COLUMNS), -(-shape.intermediate // COLUMNS)
    slices = 2 if large and second % 2 == 0 else 1

    def fitting(rows: int, units: int, blocks: float, matrices: int) -> QuadsPlan | None:
        total = -(-rows // (2 * ROWS))
        pairs = next((each for each in divisors(total) if blocks * total / each <= wave), total)
        even = [k for k in (1, 2) if matrices * pairs * k % warps == 0 and units % k == 0]
        depth = 2 if fmt.bits <= 2 else 1
        for tokens, split in product((8, 4), (*even, 1)):
            plan = QuadsPlan(warps, pairs, units, split, depth, tokens)
            needed = quads_bytes(plan, matrices, (fmt,), MOST_TOKENS * shape.top_k, shape.experts)
            if needed <= shared:
                return plan
        return None

    matrices = 2 if shape.gate else 1
    gate_up = fitting(shape.intermediate, first, hit, matrices)
    down = fitting(shape.hidden, second // slices, hit * slices, 1)
    return None if gate_up is None or down is None else (gate_up, down)
