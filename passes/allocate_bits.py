"""allocate-bits: the format of every projection of every expert under one size budget.

It writes BITS: ``{site: {projection: [format name] * E}}``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import IRModule

from moqc.errors import BudgetError, PipelineError
from moqc.ir.annotations import BITS, COSTS, LINEAR_COSTS, LINEAR_PLAN, PROFILE, Key
from moqc.ir.sites import ExpertSite, find_experts
from moqc.log import logger
from moqc.passes.allocation_problem import NEEDS, build_problem
from moqc.passes.base import Pass, PassContext
from moqc.passes.linear_units import add_linears
from moqc.quant.allocators.table import find_allocator
from moqc.quant.overrides import Override, restrict
from moqc.quant.problem import PROJECTIONS, Problem, Solution
from moqc.schedules.kernel_times import kernel_times
from moqc.targets import Target

MOST_BITS = 16.0
TIES = ("none", "gate-up", "expert")


@dataclass(frozen=True)
class AllocateBits(Pass):
    r"""Choose the format of every expert projection for at most `bits` stored bits per expert weight.

    `bits` counts codes, scales, zeros, padding and tables. `allocator` is a name of
    `moqc.quant.allocators.table`; `formats` the candidates, by default those whose costs were measured, or
    the allocator's own (`allocation_problem`). Raises BudgetError, with the reachable range, when no plan is
    small enough, or when the default candidates leave more than a tenth of the budget unspent.

    With the global allocator, `tie` gives projections one format: "gate-up" those two of an expert, "expert"
    all of it; `classes` is the most formats that a block may use, 0 for any; `model_bits`, if not 0, is a
    budget a weight of the whole model, in place of `bits`: the matrices of LINEAR_COSTS are then units too;
    `microseconds`, if not 0, bounds the expected time a token that the routed experts take; `overrides` hold
    the units that a pattern names to some bits, as ``layers\.0\..*down=4,8`` (`moqc.quant.overrides`).
    """

    name: ClassVar[str] = "allocate-bits"
    reads: ClassVar[tuple[Key[Any], ...]] = (COSTS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (BITS,)
    bits: float = 2.5
    allocator: str = "global"
    formats: tuple[str, ...] = ()
    tie: str = "none"
    classes: int = 0
    model_bits: float = 0.0
    microseconds: float = 0.0
    overrides: tuple[str, ...] = ()

    def required(self) -> tuple[Key[Any], ...]:
        """What the chosen allocator needs."""
        find_allocator(self.allocator)
        needs = [*NEEDS[self.allocator]]
        needs += [LINEAR_COSTS] if self.model_bits else []
        needs += [PROFILE] if self.microseconds and PROFILE not in needs else []
        return tuple(needs)

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Write BITS, and LINEAR_PLAN for a budget of the whole model."""
        sites = find_experts(mod)
        if not sites:
            raise PipelineError(f"{self.name}: the module has no R.moqc.experts left to allocate bits for")
        problem = build_problem(mod, sites, self.allocator, self.formats, self.bits)
        if self.classes:
            problem = replace(problem, max_classes=self.classes)
        problem = restrict(problem, unit_names(problem), [Override.parse(text) for text in self.overrides])
        if self.microseconds:
            latency = expected_microseconds(mod, sites, problem, ctx.need("target", self.name))
            problem = replace(problem, latency=latency, latency_budget=self.microseconds)
        if self.model_bits:
            return self._whole_model(mod, ctx, problem)
        if not self.formats:
            problem.require_spendable()
        solution = self._solve(problem)
        _report(self.allocator, problem, solution)
        return BITS.put(mod, plan_of(problem, solution.choice))

    def _whole_model(self, mod: IRModule, ctx: PassContext, problem: Problem) -> IRModule:
        checkpoint = ctx.need("checkpoint", self.name)
        whole, linears = add_linears(problem, LINEAR_COSTS.of(mod), checkpoint, self.model_bits)
        solution = self._solve(whole)
        _report(self.allocator, whole, solution)
        experts = len(problem.weights)
        chosen = zip(linears, solution.choice[experts:], strict=True)
        plan = {name: str(whole.formats[choice]) for name, choice in chosen}
        return LINEAR_PLAN.put(BITS.put(mod, plan_of(problem, solution.choice[:experts])), plan)

    def check(self) -> None:
        """Refuse bits, ties and bounds that cannot be, and those that the allocator does not know."""
        name, bits = ("model_bits", self.model_bits) if self.model_bits else ("bits", self.bits)
        if not 0 < bits <= MOST_BITS:
            raise BudgetError(f"{name}={bits:g}: must be above 0 and at most {MOST_BITS:g}")
        if self.tie not in TIES:
            raise PipelineError(f"{self.name}: tie={self.tie} is not one of {', '.join(TIES)}")
        if self.classes < 0:
            raise PipelineError(f"{self.name}: classes={self.classes} must not be negative")
        if self.microseconds < 0:
            raise PipelineError(f"{self.name}: microseconds={self.microseconds:g} must not be negative")
        constrained = self.classes or self.tie != "none" or self.model_bits or self.microseconds
        if self.allocator != "global" and (constrained or self.overrides):
            raise PipelineError(
                f"{self.name}: tie, classes, model_bits, microseconds and overrides are options of the "
                "global allocator only"
            )
        if self.model_bits and self.microseconds:
            raise PipelineError(f"{self.name}: microseconds bound the experts' time; give bits with them")

    def _solve(self, problem: Problem) -> Solution:
        if self.tie == "none":
            return find_allocator(self.allocator)(problem)
        groups = tied_units(problem, self.tie)
        found = find_allocator(self.allocator)(problem.merged(groups))
        return problem.solution(found.choice[groups], found.gap)


def expected_microseconds(
    mod: IRModule, sites: Sequence[ExpertSite], problem: Problem, target: Target
) -> NDArray[np.float64]:
    """Expected time a token of each unit in each format [U, F]: its kernel's, times how often it is hit."""
    profile, times = PROFILE.of(mod), kernel_times(target)
    found = np.empty(problem.sizes.shape)
    for unit in range(len(found)):
        site = sites[int(problem.unit_site[unit])]
        rows, columns = site.shape(PROJECTIONS[int(problem.unit_projection[unit])])
        measured = profile[site.site]
        hit = measured["pairs"][int(problem.unit_expert[unit])] / max(measured["tokens"], 1)
        found[unit] = [hit * times.binding(rows, columns, fmt) for fmt in problem.formats]
    return found


def unit_names(problem: Problem) -> list[str]:
    """Name of each unit of experts, ``site.expert.projection``."""
    units = zip(problem.unit_site, problem.unit_expert, problem.unit_projection, strict=True)
    return [f"{problem.sites[site]}.{expert}.{PROJECTIONS[name]}" for site, expert, name in units]


def tied_units(problem: Problem, tie: str) -> NDArray[np.int64]:
    """Group of each unit, int64 [U] numbered by first unit, for a `tie` of `TIES` but "none"."""
    down = PROJECTIONS.index("down")
    parts = (problem.unit_projection == down) if tie == "gate-up" else np.zeros_like(problem.unit_projection)
    keys = np.stack([problem.unit_site, problem.unit_expert, parts], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def plan_of(problem: Problem, choices: NDArray[np.int64]) -> dict[str, dict[str, list[str]]]:
    """`choices`, the index of each unit's format, as BITS: site -> projection -> format of each expert."""
    plan: dict[str, dict[str, list[str]]] = {site: {} for site in problem.sites}
    units = zip(problem.unit_site, problem.unit_projection, choices, strict=True)
    for site, projection, choice in units:  # experts come in order
        names = plan[problem.sites[site]].setdefault(PROJECTIONS[projection], [])
        names.append(str(problem.formats[choice]))
    return plan


def _report(allocator: str, problem: Problem, solution: Solution) -> None:
    counts = np.bincount(solution.choice, weights=problem.weights, minlength=len(problem.formats))
    shares = (count / counts.sum() for count in counts)
    used = ", ".join(f"{f} {s:.0%}" for f, s in zip(problem.formats, shares, strict=True) if s)
    proven = "" if solution.gap is None else f", within {solution.gap:.2g} of the least cost"
    logger.info(
        "%s: %.4f of %.4f bits per expert weight%s (%s)",
        allocator,
        problem.bits_per_weight(solution.size),
        problem.bits_per_weight(problem.available_bits),
        proven,
        used,
    )
