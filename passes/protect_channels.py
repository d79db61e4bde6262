"""protect-channels: the input channels that swing most between datasets get more bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.statistics import collect_statistics
from moqc.errors import PipelineError
from moqc.ir.annotations import CHANNELS, PROTECTION, Key
from moqc.passes.base import Pass, PassContext
from moqc.quant.protection import Protection, swing

SCORES = ("swing", "energy")


@dataclass(frozen=True)
class ProtectChannels(Pass):
    """Choose the channels of each block's input that gate and up store more than once.

    At least `share` of the channels, in whole tiles of columns: those whose share of the block's energy
    differs most between the calibration datasets (`by`: swing) or that have most of it (energy). Each gets
    `copies` besides, so b bits become ``b (1 + copies)``. Runs before allocate-bits, which counts the added
    columns. Writes PROTECTION: ``{site: {"channels": [int, ...], "copies": int}}``.
    """

    name: ClassVar[str] = "protect-channels"
    reads: ClassVar[tuple[Key[Any], ...]] = (CHANNELS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (PROTECTION,)
    share: float = 0.01
    copies: int = 1
    by: str = "swing"

    def check(self) -> None:
        """Refuse shares, copies and scores that cannot be."""
        if not 0 < self.share < 1:
            raise PipelineError(f"{self.name}: share={self.share:g} must be above 0 and below 1")
        if not 1 <= self.copies <= 7:
            raise PipelineError(f"{self.name}: copies={self.copies} must be 1 to 7")
        if self.by not in SCORES:
            raise PipelineError(f"{self.name}: by={self.by} is not one of {', '.join(SCORES)}")

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        checkpoint, calibration = ctx.need("checkpoint", self.name), ctx.need("calibration", self.name)
        statistics = collect_statistics(checkpoint, calibration, ctx.need("workspace", self.name))
        if self.by == "swing" and len(statistics.datasets) < 2:
            raise PipelineError(f"{self.name}: by=swing needs two calibration files or more; use by=energy")
        chosen = {}
        for site in statistics.sites:
            energy = statistics.of(site).input_energy.sum(1)  # over experts: a token's channel, once a pair
            scores = swing(energy) if self.by == "swing" else energy.sum(0)
            protection = Protection.choose(scores, self.share, self.copies)
            chosen[site] = {"channels": list(protection.channels), "copies": self.copies}
        return PROTECTION.put(mod, chosen)
