"""measure-gradients: what a change of each expert does to the loss, by one backward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.gradients import TOKENS, Gradients, measure_gradients
from moqc.ir.annotations import GRADIENTS, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.scaling import to_integers
from moqc.quant.problem import MCMOE_BITS

LARGEST = 10**12


@dataclass(frozen=True)
class MeasureGradients(Pass):
    """Weigh the error of each expert, rounded to 1, 2 and 3 bits, with the squared gradient of the loss.

    One backward pass over about `tokens` calibration tokens; the hidden states of all layers are in memory
    for them. Writes GRADIENTS: ``{"tokens": int, "sites": {site: {"1": [int] * E, "2": ..., "3": ...}}}``,
    GEMQ's coefficients, scaled so that the largest of the module is 1e12.
    """

    name: ClassVar[str] = "measure-gradients"
    writes: ClassVar[tuple[Key[Any], ...]] = (GRADIENTS,)
    tokens: int = TOKENS

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        gradients = run_backward(ctx, self.name, self.tokens)
        errors = {site: gradients.errors(site) for site in gradients.keys}
        largest = max(max(max(row) for row in rows) for rows in errors.values())
        scale = LARGEST / largest if largest > 0 else 0.0
        sites = {
            site: {
                str(bits): to_integers(column, scale)
                for bits, column in zip(MCMOE_BITS, zip(*rows, strict=True), strict=True)
            }
            for site, rows in errors.items()
        }
        return GRADIENTS.put(mod, {"tokens": self.tokens, "sites": sites})


def run_backward(ctx: PassContext, name: str, tokens: int) -> Gradients:
    """The gradients that `MeasureGradients` summed up, from the workspace where they are there."""
    return measure_gradients(
        ctx.need("checkpoint", name),
        ctx.need("calibration", name),
        ctx.need("workspace", name),
        tokens=tokens,
    )
