"""profile-margins: how close the routers' choices are, and which a disturbance would change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tvm import IRModule

from moqc.calibrate.margins import Margins, measure_margins
from moqc.errors import PipelineError
from moqc.ir.annotations import MARGINS, PARAMS, Key
from moqc.ir.sites import find_linears
from moqc.passes.base import Pass, PassContext


@dataclass(frozen=True)
class ProfileMargins(Pass):
    """Measure the gap between the last expert a token chooses and the first it does not.

    Writes MARGINS: ``{router: {"tokens": int, "margin_ppm": [5 ints], "flips_ppm": int, "experts_ppm": [int]
    * E}}``: the 5, 25, 50, 75 and 95 % quantiles of the gap, over the standard deviation of the router's
    logits; the share of tokens whose last choice changes when Gaussian noise of `noise` times the norm of
    the router's input is added to it, in closed form; the same by expert, tokens that it gains or loses over
    those it has. `tokens`: calibration tokens used.
    """

    name: ClassVar[str] = "profile-margins"
    reads: ClassVar[tuple[Key[Any], ...]] = (PARAMS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (MARGINS,)
    noise: float = 0.1
    tokens: int = 4096

    def check(self) -> None:
        """Refuse noise that is none."""
        if self.noise <= 0:
            raise PipelineError(f"{self.name}: noise={self.noise:g} must be above 0")

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        found = measure_margins(
            ctx.need("checkpoint", self.name),
            ctx.need("calibration", self.name),
            ctx.need("workspace", self.name),
            [site.site for site in find_linears(mod) if site.router],
            tokens=self.tokens,
        )
        return MARGINS.put(mod, {name: self._summary(one) for name, one in found.items()})

    def _summary(self, one: Margins) -> dict[str, Any]:
        flips = one.flips(self.noise)
        changed = torch.zeros(len(one.counts), dtype=torch.float64)
        for column in (0, 1):
            changed.index_add_(0, one.pairs[:, column], flips)
        levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
        return {
            "tokens": len(flips),
            "margin_ppm": _parts_per_million(one.margins.quantile(levels) / one.spread),
            "flips_ppm": round(float(flips.mean()) * 1e6),
            "experts_ppm": _parts_per_million(changed / one.counts.clamp(min=1)),
        }


def _parts_per_million(values: torch.Tensor) -> list[int]:
    found: list[int] = (values.double() * 1e6).round().long().tolist()
    return found
