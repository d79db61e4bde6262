"""measure-sensitivity: how much an error in the output of each experts block changes what the model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.costs import measure_sensitivity
from moqc.ir.annotations import SENSITIVITY, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.scaling import to_integers

LARGEST = 10**9


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Measure the KL divergence that a squared error in the output of each experts block causes.

    Noise is added to one block's output at a time, on `tokens` calibration tokens. Writes SENSITIVITY:
    ``{site: int}``, KL divergence over squared error, scaled so that the largest is 1e9.
    """

    name: ClassVar[str] = "measure-sensitivity"
    writes: ClassVar[tuple[Key[Any], ...]] = (SENSITIVITY,)
    tokens: int = 2048

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        found = measure_sensitivity(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
            tokens=self.tokens,
            seed=ctx.seed,
        )
        largest = max(found.values())
        scaled = to_integers(found.values(), LARGEST / largest if largest > 0 else 0.0)
        return SENSITIVITY.put(mod, dict(zip(found, scaled, strict=True)))
