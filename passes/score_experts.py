"""score-experts: one importance for every expert, and the super experts among them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from tvm import IRModule

from moqc.errors import PipelineError
from moqc.ir.annotations import CHANNELS, COSTS, PROFILE, SCORES, Key
from moqc.ir.sites import find_experts
from moqc.log import logger
from moqc.passes.base import Pass, PassContext
from moqc.quant.formats import Format


@dataclass(frozen=True)
class ScoreExperts(Pass):
    """Score every expert by what its coarsest format costs, and name super experts.

    An expert's score is the summed cost of its projections in the smallest format measured, over the mean of
    its block. One above `super_ratio` times the block's median is a super expert: a few such experts carry
    most of a block's effect, and destroy the model when stored coarsely (MC-MoE reports 600 times for one of
    Mixtral's). Writes SCORES: ``{site: {"score_ppm": [int] * E, "super": [expert], "starved": [expert],
    "drift_ppm": [int] * E}}``; `allocate-bits` gives super experts formats of at least 4 bits.
    """

    name: ClassVar[str] = "score-experts"
    reads: ClassVar[tuple[Key[Any], ...]] = (COSTS, PROFILE, CHANNELS)
    writes: ClassVar[tuple[Key[Any], ...]] = (SCORES,)
    super_ratio: float = 50.0

    def check(self) -> None:
        """Refuse a ratio that every expert would exceed."""
        if self.super_ratio <= 1:
            raise PipelineError(f"{self.name}: super_ratio={self.super_ratio:g} must be above 1")

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Reads annotations only."""
        costs, profile, channels = COSTS.of(mod), PROFILE.of(mod), CHANNELS.of(mod)
        found = {}
        for site in (one.site for one in find_experts(mod)):
            totals = _totals(costs[site])
            mean, middle = sum(totals) / len(totals), median(totals)
            strong = [e for e, cost in enumerate(totals) if middle > 0 and cost > self.super_ratio * middle]
            if strong:
                logger.warning("%s: super experts %s", site, ", ".join(map(str, strong)))
            starved = {*channels[site]["input"]["starved"], *channels[site]["hidden"]["starved"]}
            found[site] = {
                "score_ppm": [round(cost / mean * 1e6) if mean else 10**6 for cost in totals],
                "super": strong,
                "starved": sorted(starved),
                "drift_ppm": profile[site]["drift_ppm"],
            }
        return SCORES.put(mod, found)


def _totals(costs: dict[str, dict[str, list[int]]]) -> list[int]:
    """Cost of each expert with all its projections in the coarsest format that was measured for them."""
    names = set.intersection(*(set(by_format) for by_format in costs.values()))
    coarsest = min(names, key=lambda name: Format.parse(name).stored_bits(4096, 4096))
    return [
        sum(column) for column in zip(*(by_format[coarsest] for by_format in costs.values()), strict=True)
    ]
