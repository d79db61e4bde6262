"""measure-similarity: how far each experts block turns the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.blocks import measure_similarity
from moqc.ir.annotations import SIMILARITY, Key
from moqc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class MeasureSimilarity(Pass):
    """Compare the residual stream before and after each experts block, on `tokens` calibration tokens.

    Writes SIMILARITY: ``{site: int}``, the mean cosine similarity in parts per million (QuantMoE-Bench).
    """

    name: ClassVar[str] = "measure-similarity"
    writes: ClassVar[tuple[Key[Any], ...]] = (SIMILARITY,)
    tokens: int = 8192

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        found = measure_similarity(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
            tokens=self.tokens,
        )
        return SIMILARITY.put(mod, {site: round(value * 1e6) for site, value in found.items()})
