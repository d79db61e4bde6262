"""measure-sensitivity: how much an error in the output of each experts block changes what the model says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.costs import measure_sensitivity
from moqc.ir.annotations import SENSITIVITY, Key
from moqc.log import logger
from moqc.passes.base import Pass, PassContext
from moqc.passes.scaling import to_integers

SCALE = 1e12
"""The annotation holds 1e-12 nats for each unit of squared error."""
FLOOR = 1e-3
"""Least sensitivity, as a share of the largest: a divergence lost in rounding must not make errors free."""


@dataclass(frozen=True)
class MeasureSensitivity(Pass):
    """Measure the KL divergence that a squared error in the output of each experts block causes.

    Noise is added to one block's output at a time, on `tokens` calibration tokens. Writes SENSITIVITY:
    ``{site: int}``, KL divergence over squared error in 1e-12 nats, and at least
    `FLOOR` of the largest.
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
        if not any(found.values()):
            logger.warning("no block's noise changed the output: all blocks count the same")
            found = dict.fromkeys(found, 1.0)
        largest = max(found.values())
        scaled = to_integers((max(value, FLOOR * largest) for value in found.values()), SCALE)
        return SENSITIVITY.put(mod, dict(zip(found, scaled, strict=True)))
