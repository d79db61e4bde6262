"""profile-activation: which experts the calibration text uses, how often and how strongly, by dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from tvm import IRModule

from moqc.calibrate.statistics import SiteStatistics, collect_statistics
from moqc.ir.annotations import PROFILE, Key
from moqc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class ProfileActivation(Pass):
    """Count how often and how strongly the router uses each expert on the calibration text.

    Writes PROFILE: ``{site: {"tokens": int, "pairs": [int] * E, "weight_ppm": [int] * E, "datasets": {name:
    [int] * E}}}``: tokens seen; (token, chosen expert) pairs; mean routing weight of an expert's pairs in
    parts per million, 0 for an expert without any; the pairs of each dataset alone.
    """

    name: ClassVar[str] = "profile-activation"
    writes: ClassVar[tuple[Key[Any], ...]] = (PROFILE,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        checkpoint, calibration = ctx.need("checkpoint", self.name), ctx.need("calibration", self.name)
        statistics = collect_statistics(checkpoint, calibration, ctx.need("workspace", self.name))
        profile = {site: _profile(statistics.of(site), statistics.datasets) for site in statistics.sites}
        return PROFILE.put(mod, profile)


def _profile(measured: SiteStatistics, datasets: tuple[str, ...]) -> dict[str, Any]:
    weight: Tensor = measured.weight_mass.sum(0) / measured.counts.clamp(min=1)
    return {
        "tokens": measured.tokens,
        "pairs": measured.counts.tolist(),
        "weight_ppm": (weight * 1e6).round().long().tolist(),
        "datasets": dict(zip(datasets, measured.pairs.tolist(), strict=True)),
    }
