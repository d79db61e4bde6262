"""measure-costs: the harm of storing each expert projection in each candidate format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.costs import SiteCosts, measure_costs
from moqc.calibrate.statistics import collect_statistics
from moqc.errors import PipelineError
from moqc.ir.annotations import CHANNELS, COSTS, SENSITIVITY, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.scaling import to_integers
from moqc.quant.formats import Format

FORMATS = ("int1-g128", "int2-g128", "int2-g64", "int3-g128", "int4-g128")
LARGEST = 10**12


@dataclass(frozen=True)
class MeasureCosts(Pass):
    """Quantize every expert projection alone, in every format, and measure the block's output error.

    `quantizer` is "gptq" or "rtn". The squared error over the calibration tokens is multiplied by the block's
    SENSITIVITY where that was measured. Writes COSTS: ``{site: {projection: {format: [int] * E}}}``, scaled
    so that the largest of the module is 1e12; costs of different units add up.
    """

    name: ClassVar[str] = "measure-costs"
    reads: ClassVar[tuple[Key[Any], ...]] = (CHANNELS, SENSITIVITY)
    writes: ClassVar[tuple[Key[Any], ...]] = (COSTS,)
    quantizer: str = "gptq"
    formats: tuple[str, ...] = FORMATS

    def required(self) -> tuple[Key[Any], ...]:
        """The sensitivity may be missing: all blocks then count the same."""
        return (CHANNELS,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        if self.quantizer not in ("gptq", "rtn"):
            raise PipelineError(f"{self.name}: quantizer={self.quantizer} is not one of gptq, rtn")
        if not self.formats:
            raise PipelineError(f"{self.name}: formats= is empty; name at least one, such as int3-g64")
        checkpoint, calibration = ctx.need("checkpoint", self.name), ctx.need("calibration", self.name)
        statistics = collect_statistics(checkpoint, calibration, ctx.need("workspace", self.name))
        formats = [Format.parse(name) for name in self.formats]
        costs = measure_costs(checkpoint, statistics, formats, quantizer=self.quantizer)
        return COSTS.put(mod, _scaled(costs, SENSITIVITY.get(mod)))


def _scaled(costs: dict[str, SiteCosts], sensitivity: dict[str, int] | None) -> dict[str, Any]:
    factor = {site: 1.0 if sensitivity is None else float(sensitivity[site]) for site in costs}
    largest = max(
        factor[site] * max(values)
        for site, projections in costs.items()
        for by_format in projections.values()
        for values in by_format.values()
    )
    scale = LARGEST / largest if largest > 0 else 0.0
    return {
        site: {
            projection: {
                name: to_integers(values, factor[site] * scale) for name, values in by_format.items()
            }
            for projection, by_format in projections.items()
        }
        for site, projections in costs.items()
    }
