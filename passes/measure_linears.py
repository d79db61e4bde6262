"""measure-linears: the harm of storing each matrix outside the experts in each candidate format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.linears import measure_linears
from moqc.errors import PipelineError
from moqc.ir.annotations import LINEAR_COSTS, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.passes.scaling import NATS, to_integers
from moqc.quant.formats import Format

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int8-g64-sym")


@dataclass(frozen=True)
class MeasureLinears(Pass):
    """Round every matrix outside the experts alone and measure the divergence of the model's output.

    Measured in the format `probe` on about `tokens` calibration tokens; the costs in the other `formats`
    follow the errors of the weights. Writes LINEAR_COSTS: ``{site: {format: int}}``, KL divergence in 1e-15
    nats a token. Routers and matrices of fewer than 16 rows are left out, as quantize-linears leaves them.
    """

    name: ClassVar[str] = "measure-linears"
    writes: ClassVar[tuple[Key[Any], ...]] = (LINEAR_COSTS,)
    formats: tuple[str, ...] = FORMATS
    probe: str = "int3-g64"
    tokens: int = 2048

    def check(self) -> None:
        """Refuse an empty list of formats."""
        if not self.formats:
            raise PipelineError(f"{self.name}: formats= is empty; name at least one, such as int4-g64")

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        costs = measure_linears(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
            sorted(QuantizeLinears().eligible(mod)),
            [Format.parse(name) for name in self.formats],
            probe=Format.parse(self.probe),
            tokens=self.tokens,
        )
        found = {
            site: dict(zip(by_format, to_integers(by_format.values(), NATS), strict=True))
            for site, by_format in costs.items()
        }
        return LINEAR_COSTS.put(mod, found)
