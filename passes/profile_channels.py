"""profile-channels: second moments of what every expert projection reads, kept in the workspace."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from tvm import IRModule

from moqc.calibrate.statistics import SiteStatistics, collect_statistics
from moqc.ir.annotations import CHANNELS, Key
from moqc.log import logger
from moqc.passes.base import Pass, PassContext

TOP_SHARE = 0.01
"""Share of channels called the strongest."""


@dataclass(frozen=True)
class ProfileChannels(Pass):
    """Accumulate the gate-weighted second moments of the inputs of every expert projection.

    The matrices go to the workspace. Writes CHANNELS: ``{site: {"input": summary, "hidden": summary}}`` for
    the input of gate and up and for that of down; a summary is ``{"columns": int, "starved": [expert, ...],
    "top_ppm": [int] * E}``: experts that saw fewer tokens than columns (their matrices are shrunk toward the
    layer's), and the share of an expert's energy in the strongest 1 % of its channels, in parts per million.
    """

    name: ClassVar[str] = "profile-channels"
    writes: ClassVar[tuple[Key[Any], ...]] = (CHANNELS,)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        checkpoint, calibration = ctx.need("checkpoint", self.name), ctx.need("calibration", self.name)
        statistics = collect_statistics(checkpoint, calibration, ctx.need("workspace", self.name))
        channels = {site: _channels(statistics.of(site)) for site in statistics.sites}
        _warn_starved(channels)
        return CHANNELS.put(mod, channels)


def _channels(measured: SiteStatistics) -> dict[str, Any]:
    return {
        "input": _summary(measured.input_moments, measured.hessians("gate").starved),
        "hidden": _summary(measured.hidden_moments, measured.hessians("down").starved),
    }


def _summary(moments: Tensor, starved: list[int]) -> dict[str, Any]:
    energy = moments.diagonal(dim1=1, dim2=2).double()
    top = energy.topk(max(1, round(energy.shape[1] * TOP_SHARE)), dim=1).values.sum(1)
    share = top / energy.sum(1).clamp(min=1e-300)
    return {
        "columns": energy.shape[1],
        "starved": starved,
        "top_ppm": (share * 1e6).round().long().tolist(),
    }


def _warn_starved(channels: dict[str, Any]) -> None:
    starved = sum(len({*site["input"]["starved"], *site["hidden"]["starved"]}) for site in channels.values())
    if starved:
        experts = sum(len(site["input"]["top_ppm"]) for site in channels.values())
        logger.warning(
            "%d of %d experts saw fewer calibration tokens than they have columns; their Hessians lean on "
            "their layer's: more calibration text helps",
            starved,
            experts,
        )
