"""measure-block-errors: MC-MoE's coefficients, the change of a block with one expert rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.costs import measure_block_errors
from moqc.ir.annotations import BLOCK_ERRORS, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.scaling import to_integers
from moqc.quant.problem import MCMOE_BITS

LARGEST = 10**9


@dataclass(frozen=True)
class MeasureBlockErrors(Pass):
    """Round one expert at a time to 1, 2 and 3 bits as MC-MoE does and measure the change of its block.

    Writes BLOCK_ERRORS: ``{site: {"1": [int] * E, "2": [int] * E, "3": [int] * E}}``, Frobenius norms summed
    over batches, scaled by site so that its largest is 1e9.
    """

    name: ClassVar[str] = "measure-block-errors"
    writes: ClassVar[tuple[Key[Any], ...]] = (BLOCK_ERRORS,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        errors = measure_block_errors(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
        )
        return BLOCK_ERRORS.put(mod, {site: _site(by_expert) for site, by_expert in errors.items()})


def _site(by_expert: list[list[float]]) -> dict[str, list[int]]:
    largest = max(max(errors) for errors in by_expert)
    scale = LARGEST / largest if largest > 0 else 0.0
    columns = zip(*by_expert, strict=True)
    return {str(bits): to_integers(column, scale) for bits, column in zip(MCMOE_BITS, columns, strict=True)}
