"""profile-weights: what data-free heuristics read of the expert weights: entropy and outliers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import IRModule

from moqc.calibrate.blocks import outlier_scores, weight_entropy
from moqc.calibrate.layers import LayeredModel
from moqc.ir.annotations import WEIGHTS, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.scaling import to_integers


@dataclass(frozen=True)
class ProfileWeights(Pass):
    """Measure the entropy of each block's expert weights and the outliers of each expert's projections.

    Writes WEIGHTS: ``{site: {"entropy": int, "outliers": {projection: [int] * E}}}``: EWQ's entropy in
    billionths of a nat; QuantMoE-Bench's outlier score in parts per million.
    """

    name: ClassVar[str] = "profile-weights"
    writes: ClassVar[tuple[Key[Any], ...]] = (WEIGHTS,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint."""
        model = LayeredModel(ctx.need("checkpoint", self.name))
        return WEIGHTS.put(mod, {site: _site(model, site) for site in model.layouts})


def _site(model: LayeredModel, site: str) -> dict[str, Any]:
    weights = model.experts(site)
    outliers = {
        name: to_integers(outlier_scores(weights.matrices(name)).tolist(), 1e6)
        for name in weights.projections
    }
    return {"entropy": round(weight_entropy(weights) * 1e9), "outliers": outliers}
