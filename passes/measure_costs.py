"""measure-costs: the harm of storing each expert projection in each candidate format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import IRModule

from moqc.calibrate.costs import SiteCosts, UnitCosts, measure_costs
from moqc.calibrate.statistics import collect_statistics
from moqc.errors import PipelineError
from moqc.ir.annotations import CHANNELS, COSTS, GRADIENTS, SENSITIVITY, Key
from moqc.passes.base import Pass, PassContext
from moqc.passes.measure_gradients import run_backward
from moqc.passes.measure_sensitivity import SCALE
from moqc.passes.scaling import NATS, to_integers
from moqc.quant.formats import Format
from moqc.quant.quantizers import STORABLE

FORMATS = ("int1-g128-sym-s8", "int2-g128-sym-s8", "int3-g128-sym-s8", "int4-g128-s8")
"""Zero points would not pay for their bits; docs/methods.md has the costs."""
WEIGHTED = ("expert", "token")
"""Curvatures that are made of gradients."""
CURVATURES = ("block", *WEIGHTED)
LARGEST = 1e12
"""The largest cost where costs are no nats."""


@dataclass(frozen=True)
class MeasureCosts(Pass):
    """Quantize every expert projection alone, in every format, and measure the block's output error.

    `quantizer` is one of gptq, awq, rtn and hqq. A unit's cost on a dataset is the squared error a token,
    multiplied by the block's SENSITIVITY where that was measured. With ``curvature=expert`` it is weighted by
    half the mean squared gradient of the loss in the expert's output instead, with ``curvature=token`` every
    component by that of its own token and channel. The cost is the mean over the
    datasets plus `robustness` times their standard deviation, of which a share of `prior` is replaced by the
    cost on text that uses all experts alike: the domains that calibration lacks. With `rotate`, the inputs of
    down are rotated, as `quantize-experts{rotate=true}` will have them; `held_out`: errors are measured on
    tokens that the Hessians of the quantizer do not see. Writes COSTS: ``{site: {projection:
    {format: [int] * E}}}``, in 1e-15 nats a token; without sensitivity and gradients, squared errors scaled
    so that the largest of the module is 1e12. Costs of different units add up.
    """

    name: ClassVar[str] = "measure-costs"
    reads: ClassVar[tuple[Key[Any], ...]] = (CHANNELS, SENSITIVITY, GRADIENTS)
    writes: ClassVar[tuple[Key[Any], ...]] = (COSTS,)
    quantizer: str = "gptq"
    formats: tuple[str, ...] = FORMATS
    curvature: str = "block"
    robustness: float = 0.0
    rotate: bool = False
    prior: float = 0.0
    held_out: bool = False

    def required(self) -> tuple[Key[Any], ...]:
        """The sensitivity may be missing: all blocks then count the same."""
        return (CHANNELS, GRADIENTS) if self.curvature in WEIGHTED else (CHANNELS,)

    def check(self) -> None:
        """Refuse quantizers, curvatures, shares and formats that cannot be."""
        if self.quantizer not in STORABLE:
            raise PipelineError(
                f"{self.name}: quantizer={self.quantizer} is not one of {', '.join(STORABLE)}"
            )
        if self.curvature not in CURVATURES:
            raise PipelineError(
                f"{self.name}: curvature={self.curvature} is not one of {', '.join(CURVATURES)}"
            )
        if self.robustness < 0:
            raise PipelineError(f"{self.name}: robustness={self.robustness:g} must not be negative")
        if not 0 <= self.prior <= 1:
            raise PipelineError(f"{self.name}: prior={self.prior:g} must be from 0 to 1")
        if not self.formats:
            raise PipelineError(f"{self.name}: formats= is empty; name at least one, such as int3-g64")

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Needs a checkpoint, calibration text and a workspace."""
        checkpoint, calibration = ctx.need("checkpoint", self.name), ctx.need("calibration", self.name)
        statistics = collect_statistics(checkpoint, calibration, ctx.need("workspace", self.name))
        formats = [Format.parse(name) for name in self.formats]
        weighted = self.curvature in WEIGHTED
        gradients = run_backward(ctx, self.name, GRADIENTS.of(mod)["tokens"]) if weighted else None
        costs = measure_costs(
            checkpoint,
            statistics,
            formats,
            quantizer=self.quantizer,
            gradients=gradients,
            by_token=self.curvature == "token",
            rotate=self.rotate,
            held_out=self.held_out,
        )
        sensitivity = SENSITIVITY.get(mod)
        if weighted:  # the change of the loss, by the diagonal of the Fisher information
            factor = dict.fromkeys(costs, 0.5 * NATS)
        elif sensitivity is not None:
            factor = {site: sensitivity[site] / SCALE * NATS for site in costs}
        else:
            factor = None
        return COSTS.put(mod, _scaled(costs, factor, self.robustness, self.prior))


def robust(costs: UnitCosts, robustness: float, prior: float) -> list[float]:
    """Costs [expert]: mean plus `robustness` standard deviations over datasets, a share of `prior` even."""
    table = np.array(costs["datasets"])
    seen = table.mean(axis=0) + robustness * table.std(axis=0)
    found: list[float] = ((1 - prior) * seen + prior * np.array(costs["even"])).tolist()
    return found


def _scaled(
    measured: dict[str, SiteCosts], factors: Mapping[str, float] | None, robustness: float, prior: float
) -> dict[str, Any]:
    costs = {
        site: {
            projection: {name: robust(found, robustness, prior) for name, found in by_format.items()}
            for projection, by_format in projections.items()
        }
        for site, projections in measured.items()
    }
    if factors is None:
        largest = max(
            max(values)
            for projections in costs.values()
            for by_format in projections.values()
            for values in by_format.values()
        )
        factors = dict.fromkeys(costs, LARGEST / largest if largest > 0 else 0.0)
    return {
        site: {
            projection: {name: to_integers(values, factors[site]) for name, values in by_format.items()}
            for projection, by_format in projections.items()
        }
        for site, projections in costs.items()
    }
