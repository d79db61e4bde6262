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
    [int] * E}, "drift_ppm": [int] * E, "significance_ppm": {name: [int] * E}}}``: tokens seen; (token,
    chosen expert) pairs; mean routing weight of an expert's pairs in parts per million, 0 for an expert
    without any; the pairs of each dataset alone; standard deviation over mean, across datasets, of the
    routing weight an expert gets a token; MoQa's significance, an expert's share of the energy of all hidden
    channels of the site, each multiplied by its routing weight, on each dataset.
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
        "weight_ppm": _parts_per_million(weight),
        "datasets": dict(zip(datasets, measured.pairs.tolist(), strict=True)),
        "drift_ppm": _parts_per_million(drift(measured)),
        "significance_ppm": {
            name: _parts_per_million(row) for name, row in zip(datasets, significance(measured), strict=True)
        },
    }


def drift(measured: SiteStatistics) -> Tensor:
    """Coefficient of variation over datasets of the routing weight a token gives each expert, float64 [E]."""
    share = measured.weight_mass / measured.weight_mass.sum(1, keepdim=True)
    return share.std(0, correction=0) / share.mean(0).clamp(min=1e-30)


def significance(measured: SiteStatistics) -> Tensor:
    """MoQa's expert significance (arXiv 2503.21135, equation 1), float64 [D, E], rows sum to 1.

    The paper leaves the channel's statistic open; here it is the energy, the sum of squares over tokens.
    """
    energy = measured.hidden_energy.double().sum(2)
    return energy / energy.sum(1, keepdim=True).clamp(min=1e-300)


def _parts_per_million(values: Tensor) -> list[int]:
    found: list[int] = (values * 1e6).round().long().tolist()
    return found
