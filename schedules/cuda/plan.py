"""What the kernels of one experts block depend on, and how they are cut into blocks; no TVM here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from moqc.errors import InternalError, UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.experts import ExpertsLayer

COLUMN_TOKENS = 8
"""Tokens of a slot: the columns of the tensor core's smallest product."""
MULTIPROCESSORS = 132
"""Of an H200, for which plans were chosen."""
LARGE_ROWS = 256
"""Row tiles of a large expert's gate (4096 rows): bandwidth counts, not latency."""
SHARED_BYTES = 227 * 1024
"""Shared memory a block may have (sm_90; sm_80 has 163 KiB, sm_86 and sm_89 99 KiB)."""

BYTES_SCRATCH = 512
"""Shared memory in which a warp turns one token's activations into bytes (``bytes.cu``)."""


@dataclass(frozen=True)
class ExpertsShape(ExpertsLayer):
    """A layer that there are kernels for; UserError otherwise."""

    def __post_init__(self) -> None:
        for fmt in (*self.gate, *self.up, *self.down):
            if fmt.simulated:
                raise UserError(f"format {fmt}: no CUDA kernel reads {fmt.bits} bits")
        if self.hidden % 8 or self.intermediate % 8:
            raise UserError(
                f"experts of {self.hidden} x {self.intermediate}: the CUDA kernels want multiples of 8"
            )
        if -(-self.hidden // COLUMNS) > 32:
            raise UserError(f"hidden size {self.hidden}: the CUDA kernels take up to {32 * COLUMNS}")

    def slots(self, tokens: int) -> int:
        """The most slots (an expert and up to 8 of its tokens) that `tokens` tokens can take."""
        pairs = tokens * self.top_k
        if tokens == 1:
            return self.top_k
        return min(pairs, self.experts + (pairs // COLUMN_TOKENS if tokens > COLUMN_TOKENS else 0))


@dataclass(frozen=True)
class Plan:
    """How a product is cut.

    A block of `warps` warps takes `tiles` row tiles (of each projection), every warp one unit of columns.
    `stages` tiles of weights are on their way at any time: in `registers`, or in a ring of each warp in
    shared memory. It takes `items` times as many, and adds up its warps' partial sums after each. `tokens` is
    8, or 1: that through registers and without items, two tiles at a time, and in the registers that `stages`
    of the widest format take there are more of a narrower one (``bytes.cu``).
    """

    warps: int
    tiles: int
    stages: int
    registers: bool
    tokens: int
    items: int = 1
    slots: ClassVar[int] = 1
    """Of a block."""

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read ``w16t14r2m1i1``; the inverse of `str`."""
        match = re.fullmatch(r"w(\d+)t(\d+)([rs])(\d+)m(\d+)i(\d+)", text)
        if match is None:
            raise InternalError(f"no plan: {text!r}")
        warps, tiles, stages, tokens, items = (int(match[at]) for at in (1, 2, 4, 5, 6))
        return cls(warps, tiles, stages, match[3] == "r", tokens, items)

    def __str__(self) -> str:
        ahead = f"{'r' if self.registers else 's'}{self.stages}"
        return f"w{self.warps}t{self.tiles}{ahead}m{self.tokens}i{self.items}"


def slot_bytes(formats: Sequence[Format]) -> int:
    """Bytes of one unit in a ring (``Formats::SLOT`` of device.cu)."""
    groups = max(COLUMNS // fmt.group for fmt in formats)
    zeros = 0 if all(fmt.symmetric for fmt in formats) else groups * 64
    return max(fmt.bits for fmt in formats) * 512 + groups * 128 + zeros


def shared_bytes(plan: Plan, projections: int, formats: Sequence[Format]) -> int:
    """Shared memory of a block: the partial sums of every warp, and their rings or what they need beside."""
    partials = projections * plan.tiles * plan.warps * ROWS * plan.tokens * 4
    if plan.registers:
        return partials + (plan.warps * BYTES_SCRATCH if plan.tokens == 1 else 0)
    return partials + plan.warps * plan.stages * slot_bytes(formats)


def gate_up_rule(shape: ExpertsShape, tokens: int, shared: int = SHARED_BYTES) -> Plan:
    """A plan of gate and up for up to `tokens` (1 or 8), by what was fastest on an H200."""
    formats = (*shape.gate, *shape.up)
    bits, several = max(fmt.bits for fmt in formats), len(set(formats)) > 1
    warps, rows = -(-shape.hidden // COLUMNS), -(-shape.intermediate // ROWS)
    large = rows >= LARGE_ROWS
    cut = _Cut(warps, rows, tokens, formats, 2 if shape.gate else 1, shared)
    if tokens == 1:
        stages = 4 if large and bits <= 2 and not several else 2
        return cut.filling(shape.top_k, 16 // warps, stages)
    if large:
        # One block a multiprocessor: prepare the activations once, then many items.
        wanted = 4 if bits >= 3 and not several else 8
        share = shape.slots(tokens) * rows * 16 // (15 * MULTIPROCESSORS)
        return cut.registers(wanted, 4 if bits == 2 else 2, share)
    # Through a ring activations are prepared anew between gate and up of different formats.
    apart = shape.gate not in ((), shape.up)
    plain = bits >= 4 and not several and all(fmt.symmetric for fmt in formats)
    return cut.registers(2, 2) if apart or plain else cut.ring(4)


def down_rule(shape: ExpertsShape, tokens: int, shared: int = SHARED_BYTES) -> Plan:
    """A plan of down, likewise."""
    bits, several = max(fmt.bits for fmt in shape.down), len(set(shape.down)) > 1
    rows, units = -(-shape.hidden // ROWS), -(-shape.intermediate // COLUMNS)
    large = -(-shape.intermediate // ROWS) >= LARGE_ROWS
    if tokens == 1:
        quarter = shape.top_k * units // 4  # of the units: four blocks add to a result
        warps = quarter if not large and 4 <= quarter <= 16 else 8
        cut = _Cut(warps, rows, tokens, shape.down, 1, shared)
        return cut.registers(16, 4 if bits <= 2 and not several else 2) if large else cut.registers(2, 2)
    cut = _Cut(8, rows, tokens, shape.down, 1, shared)
    if several and not large:
        return cut.ring(8)
    return cut.registers(8, 4 if bits == 2 and not large else 2, 16 if large or bits >= 3 else 8)


def many_down_plan(shape: ExpertsShape, shared: int = SHARED_BYTES) -> Plan:
    """The plan of down for more than 8 tokens, where a block's units are of one slot."""
    units, rows = -(-shape.intermediate // COLUMNS), -(-shape.hidden // ROWS)
    warps = min(range(min(units, 8), 0, -1), key=lambda each: -(-units // each) * each)
    return _Cut(warps, rows, COLUMN_TOKENS, shape.down, 1, shared).registers(8, 2, 16)


@dataclass(frozen=True)
class _Cut:
    """What a plan has to respect: `rows` row tiles, and the shared memory."""

    warps: int
    rows: int
    tokens: int
    formats: tuple[Format, ...]
    projections: int
    shared: int

    def registers(self, tiles: int, stages: int, tiles_a_block: int = 0) -> Plan:
        """About `tiles` tiles through registers, in items up to about `tiles_a_block`."""
        tiles = self._tiles(tiles, 0)
        total = self.projections * tiles
        fitting = [each for each in range(min(stages, total), 0, -1) if total % each == 0]
        # One token is multiplied by two row tiles at a time.
        even = [each for each in fitting if each % 2 == 0] if self.tokens == 1 else fitting
        stages = (even or fitting)[0]
        items = max(
            each for each in divisors(self.rows // tiles) if each * tiles <= max(tiles_a_block, tiles)
        )
        return Plan(self.warps, tiles, stages, True, self.tokens, items)

    def filling(self, slots: int, most: int, stages: int) -> Plan:
        """As few tiles a block as fill the machine once, with up to `most` blocks a multiprocessor."""
        for each in range(most, 0, -1):
            plan = self.registers(-(-slots * self.rows // (MULTIPROCESSORS * each)), stages)
            if slots * self.rows // plan.tiles >= 0.9 * MULTIPROCESSORS * each:
                return plan
        return self.registers(-(-slots * self.rows // MULTIPROCESSORS), stages)

    def ring(self, tiles: int) -> Plan:
        """About `tiles` tiles through a ring of three stages; through registers where no ring fits."""
        if not self._fits(1, 3):
            return self.registers(2, 2)
        return Plan(self.warps, self._tiles(tiles, 3), 3, False, self.tokens)

    def _tiles(self, wanted: int, stages: int) -> int:
        """The divisor of the row tiles next to `wanted`, preferably above, that fits."""
        fitting = [each for each in divisors(self.rows) if each <= 2 * wanted and self._fits(each, stages)]
        if not fitting:
            raise UserError(f"{self.warps} warps do not fit the shared memory of a block")
        return next((each for each in fitting if each >= wanted), fitting[-1])

    def _fits(self, tiles: int, stages: int) -> bool:
        plan = Plan(self.warps, tiles, stages, stages == 0, self.tokens)
        return shared_bytes(plan, self.projections, self.formats) <= self.shared


def divisors(number: int) -> list[int]:
    """Those of `number`, rising."""
    return [each for each in range(1, number + 1) if number % each == 0]
