"""allocate-bits: the format of every projection of every expert under one size budget.

It writes BITS: ``{site: {projection: [format name] * E}}``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import IRModule

from moqc.errors import BudgetError, PipelineError
from moqc.ir.annotations import BITS, COSTS, Key
from moqc.ir.sites import find_experts
from moqc.log import logger
from moqc.passes.allocation_problem import NEEDS, build_problem
from moqc.passes.base import Pass, PassContext
from moqc.quant.allocators.table import find_allocator
from moqc.quant.problem import PROJECTIONS, Problem, Solution

MOST_BITS = 16.0
TIES = ("none", "gate-up", "expert")


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Choose the format of every expert projection for at most `bits` stored bits per expert weight.

    `bits` counts codes, scales, zeros, padding and tables. `allocator` is a name of
    `moqc.quant.allocators.table`; `formats` the candidates, by default those whose costs were measured, or
    the allocator's own (`allocation_problem`). Raises BudgetError, with the reachable range, when no plan is
    small enough, or when the default candidates leave more than a tenth of the budget unspent.

    With the global allocator, `tie` gives projections one format: "gate-up" those two of an expert, "expert"
    all of it; `classes` is the most formats that a block may use, 0 for any.
    """

    name: ClassVar[str] = "allocate-bits"
    reads: ClassVar[tuple[Key[Any], ...]] = (COSTS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (BITS,)
    bits: float = 2.5
    allocator: str = "global"
    formats: tuple[str, ...] = ()
    tie: str = "none"
    classes: int = 0

    def required(self) -> tuple[Key[Any], ...]:
        """What the chosen allocator needs."""
        find_allocator(self.allocator)
        return NEEDS[self.allocator]

    def run(self, mod: IRModule, ctx: PassContext) -> IRModule:
        """Write BITS."""
        if not 0 < self.bits <= MOST_BITS:
            raise BudgetError(
                f"bits={self.bits:g}: give expert file bits per weight above 0 and at most {MOST_BITS:g}"
            )
        sites = find_experts(mod)
        if not sites:
            raise PipelineError(f"{self.name}: the module has no R.moqc.experts left to allocate bits for")
        self._check_options()
        problem = build_problem(mod, sites, self.allocator, self.formats, self.bits)
        if self.classes:
            problem = replace(problem, max_classes=self.classes)
        if not self.formats:
            problem.require_spendable()
        solution = self._solve(problem)
        _report(self.allocator, problem, solution)
        return BITS.put(mod, plan_of(problem, solution))

    def _check_options(self) -> None:
        if self.tie not in TIES:
            raise PipelineError(f"{self.name}: tie={self.tie} is not one of {', '.join(TIES)}")
        if self.classes < 0:
            raise PipelineError(f"{self.name}: classes={self.classes} must not be negative")
        if self.allocator != "global" and (self.classes or self.tie != "none"):
            raise PipelineError(f"{self.name}: tie and classes are options of the global allocator only")

    def _solve(self, problem: Problem) -> Solution:
        if self.tie == "none":
            return find_allocator(self.allocator)(problem)
        groups = tied_units(problem, self.tie)
        found = find_allocator(self.allocator)(problem.merged(groups))
        return problem.solution(found.choice[groups], found.gap)


def tied_units(problem: Problem, tie: str) -> NDArray[np.int64]:
    """Group of each unit, int64 [U] numbered by first unit, for a `tie` of `TIES` but "none"."""
    down = PROJECTIONS.index("down")
    parts = (problem.unit_projection == down) if tie == "gate-up" else np.zeros_like(problem.unit_projection)
    keys = np.stack([problem.unit_site, problem.unit_expert, parts], axis=1)
    _, first, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse.reshape(-1)]


def plan_of(problem: Problem, solution: Solution) -> dict[str, dict[str, list[str]]]:
    """`solution` as BITS: site -> projection -> format name of each expert."""
    plan: dict[str, dict[str, list[str]]] = {site: {} for site in problem.sites}
    units = zip(problem.unit_site, problem.unit_projection, solution.choice, strict=True)
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
