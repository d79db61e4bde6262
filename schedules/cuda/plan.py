"""What the kernels of one experts block depend on, and how they are cut into blocks; no TVM here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS

MAX_TOKENS = 8
"""Tokens of one call: the columns of the tensor core's smallest product."""
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
    `stages` is the depth of each warp's ring in shared memory; 0 loads everything first, into registers.
    `tokens` is 1 or 8.
    """

    warps: int
    tiles: int
    stages: int
    tokens: int

    def __str__(self) -> str:
        return f"w{self.warps}t{self.tiles}s{self.stages}m{self.tokens}"


def slot_bytes(formats: Sequence[Format]) -> int:
    """Bytes of one unit in a ring (``Formats::SLOT`` of device.cu)."""
    groups = max(COLUMNS // fmt.group for fmt in formats)
    zeros = 0 if all(fmt.symmetric for fmt in formats) else groups * 64
    return max(fmt.bits for fmt in formats) * 512 + groups * 128 + zeros


def shared_bytes(plan: Plan, projections: int, formats: Sequence[Format]) -> int:
    """Shared memory of a block: the partial sums of every warp, and the rings."""
    partials = projections * plan.tiles * plan.warps * ROWS * plan.tokens * 4
    return partials + plan.warps * plan.stages * slot_bytes(formats)
