"""What the kernels of one experts block depend on, and how they are cut into blocks; no TVM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS

MAX_TOKENS = 8
"""Tokens of one call: the columns of the tensor core's smallest product."""
MULTIPROCESSORS = 132
"""Of an H200, for which plans were chosen."""
SHARED_BYTES = 227 * 1024
"""Shared memory a block may have (sm_90; sm_80 has 163 KiB, sm_86 and sm_89 99 KiB)."""


@dataclass(frozen=True)
class ExpertsShape:
    """What the kernels of one layer depend on; `gate` is empty for activations without one.

    Each projection lists the formats of its classes, in the order of its tensors.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gate: tuple[Format, ...]
    up: tuple[Format, ...]
    down: tuple[Format, ...]
    activation: str = "silu_glu"

    def __post_init__(self) -> None:
        if self.hidden % 8 or self.intermediate % 8:
            raise UserError(
                f"experts of {self.hidden} x {self.intermediate}: the CUDA kernels want multiples of 8"
            )
        if -(-self.hidden // COLUMNS) > 32:
            raise UserError(f"hidden size {self.hidden}: the CUDA kernels take up to {32 * COLUMNS}")

    def slots(self, tokens: int) -> int:
        """Experts that a call of up to `tokens` tokens may hit."""
        return self.top_k if tokens == 1 else min(self.experts, MAX_TOKENS * self.top_k)


@dataclass(frozen=True)
class Plan:
    """How a product is cut.

    A block of `warps` warps takes `tiles` row tiles (of each projection), every warp one unit of columns.
    `stages` tiles of weights are on their way at any time: in `registers`, or in a ring of each warp in shared
    memory. `tokens` is 1 or 8.
    """

    warps: int
    tiles: int
    stages: int
    registers: bool
    tokens: int

    def __str__(self) -> str:
        return f"w{self.warps}t{self.tiles}{'r' if self.registers else 's'}{self.stages}m{self.tokens}"


def slot_bytes(formats: Sequence[Format]) -> int:
    """Bytes of one unit in a ring (``Formats::SLOT`` of device.cu)."""
    groups = max(COLUMNS // fmt.group for fmt in formats)
    zeros = 0 if all(fmt.symmetric for fmt in formats) else groups * 64
    return max(fmt.bits for fmt in formats) * 512 + groups * 128 + zeros


def shared_bytes(plan: Plan, projections: int, formats: Sequence[Format]) -> int:
    """Shared memory of a block: the partial sums of every warp, and the rings."""
    partials = projections * plan.tiles * plan.warps * ROWS * plan.tokens * 4
    if plan.registers:
        return partials
    return partials + plan.warps * plan.stages * slot_bytes(formats)


def gate_up_plan(shape: ExpertsShape, tokens: int) -> Plan:
    """The plan of gate and up for up to `tokens` (1 or 8), by what was fastest on an H200 (docs/benchmarks-h200.md)."""
    formats = [*shape.gate, *shape.up]
    warps, row_tiles = -(-shape.hidden // COLUMNS), -(-shape.intermediate // ROWS)
    large = row_tiles >= 256
    if tokens == 1:
        # As few tiles a block as fill the machine once, at 24 warps a multiprocessor.
        blocks = MULTIPROCESSORS * max(24 // warps, 1)
        wanted = -(-shape.top_k * row_tiles // blocks)
    else:
        wanted = 8 if large else 4
    return _plan(warps, row_tiles, wanted, tokens, formats, 2 if shape.gate else 1, large)


def down_plan(shape: ExpertsShape, tokens: int) -> Plan:
    """The plan of down, likewise."""
    large = shape.intermediate >= 4096
    warps, wanted = (8, 8) if tokens > 1 else (16, 16) if large else (8, 2)
    return _plan(warps, -(-shape.hidden // ROWS), wanted, tokens, shape.down, 1, large)


def _plan(
    warps: int, rows: int, wanted: int, tokens: int, formats: Sequence[Format], projections: int, large: bool
) -> Plan:
    """At least `wanted` tiles if that many divide `rows` and fit the shared memory."""
    divisors = [tiles for tiles in range(1, rows + 1) if rows % tiles == 0]
    tiles = next((each for each in divisors if each >= wanted), divisors[-1])
    if tiles > 2 * wanted:
        tiles = max(each for each in divisors if each <= wanted)
    bits, several = max(fmt.bits for fmt in formats), len(set(formats)) > 1
    ring = several if large or tokens > 1 else False
    ring = ring or (tokens > 1 and bits <= 2 and not large)
    for each in (each for each in reversed(divisors) if each <= tiles):
        stages = 4 if large and bits <= 2 and projections * each % 4 == 0 else 2
        stages = 3 if ring else min(stages, projections * each)
        plan = Plan(warps, each, stages, not ring, tokens)
        if shared_bytes(plan, projections, formats) <= SHARED_BYTES:
            return plan
    raise UserError(f"no plan for {warps} warps and {rows} row tiles of {', '.join(map(str, formats))}")
