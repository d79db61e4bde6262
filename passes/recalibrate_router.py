"""recalibrate-router: routers choose for quantized inputs what they chose for the original ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.errors import PipelineError
from moqc.ir.annotations import BITS, PARAMS, ROUTERS, Key
from moqc.ir.sites import find_linears, rotates
from moqc.log import logger
from moqc.passes.base import Pass, PassContext
from moqc.passes.quantize_experts import protections


@dataclass(frozen=True)
class RecalibrateRouter(Pass):
    """Move each router, in closed form, so that with quantized experts it chooses as the original model.

    Runs after quantize-experts, with its `quantizer`. The new weights are float16. `damping` is that of the
    ridge regression, as a share of the mean energy of the router's inputs. Writes ROUTERS: ``{site:
    {"before_ppm": int, "after_ppm": int}}``, the share of the original's experts that are chosen.
    """

    name: ClassVar[str] = "recalibrate-router"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS, BITS)
    writes: ClassVar[tuple[Key[Any], ...]] = (ROUTERS,)

    quantizer: str = "gptq"
    damping: float = 0.1

    def check(self) -> None:
        """Refuse damping that is none."""
        if self.damping <= 0:
            raise PipelineError(f"{self.name}: damping={self.damping:g} must be above 0")

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace; new weights go to the params of `ctx`."""
        from moqc.calibrate.quantize import quantize_experts
        from moqc.calibrate.routers import recalibrate_routers

        checkpoint, calibration = ctx.need("checkpoint", self.name), ctx.need("calibration", self.name)
        workspace, params = ctx.need("workspace", self.name), ctx.need("params", self.name)
        routers = [site.site for site in find_linears(mod) if site.router]
        store = quantize_experts(
            checkpoint,
            BITS.of(mod),
            self.quantizer,
            calibration,
            workspace,
            rotate=rotates(mod),
            protections=protections(mod),
        )
        updates = recalibrate_routers(
            checkpoint, calibration, workspace, store, routers, damping=self.damping
        )
        for name, update in updates.items():
            params.put(f"{name}.weight", update.weight.numpy())
            logger.info("%s: %.1f %% agreement, was %.1f %%", name, 100 * update.after, 100 * update.before)
        return ROUTERS.put(
            mod,
            {
                name: {"before_ppm": round(update.before * 1e6), "after_ppm": round(update.after * 1e6)}
                for name, update in updates.items()
            },
        )
