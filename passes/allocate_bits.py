"""Choose the format of every projection of every expert under one size budget.

Encoding of the annotations it reads; E experts a site, lists are by expert:

* COSTS: ``{site: {projection: {format name: [int] * E}}}``. Harm of storing that unit in the format, additive
  over units; scaled so that the largest is 1e12, and only ratios matter.
* PROFILE: ``{site: {"tokens": int, "pairs": [int] * E, "weight_ppm": [int] * E, ...}}``: tokens seen, (token,
  chosen expert) pairs, mean routing weight of an expert's pairs in parts per million.
* BLOCK_ERRORS: ``{site: {"1": [int] * E, "2": ..., "3": ...}}``: change of the block's output with one expert
  quantized to that many bits; only ratios within a site matter.

It writes BITS: ``{site: {projection: [format name] * E}}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tvm import IRModule

from moqc.errors import BudgetError, PipelineError
from moqc.ir.annotations import BITS, BLOCK_ERRORS, COSTS, PROFILE, Key
from moqc.ir.sites import ExpertSite, find_experts
from moqc.log import logger
from moqc.passes.base import Pass, PassContext
from moqc.quant.allocators.table import find_allocator
from moqc.quant.formats import Format
from moqc.quant.problem import MCMOE_BITS, PROJECTIONS, Problem, Solution

FORMATS = ("int1-g64", "int2-g128", "int2-g64", "int3-g128", "int3-g64", "int4-g64", "int8-g64")
"""Candidates of allocators that need no costs, when neither `formats` nor COSTS name any."""
PMQ_FORMATS = tuple(f"int{bits}-g128" for bits in MCMOE_BITS)
NEEDS: dict[str, tuple[Key[Any], ...]] = {
    "uniform": (),
    "frequency": (PROFILE,),
    "pmq": (PROFILE, BLOCK_ERRORS),
    "global": (COSTS,),
}
"""Annotations an allocator cannot do without. Where costs are known, all but pmq use them."""
TABLE_BITS = 3 * 2 * 32
"""Stored bits of an expert's entries in the table int32 [3, E, 2] of R.moqc.mixed_experts."""
MOST_BITS = 16.0


@dataclass(frozen=True)
class AllocateBits(Pass):
    """Choose the format of every expert projection for at most `bits` stored bits per expert weight.

    `bits` counts codes, scales, zeros, padding and tables. `allocator` is a name of
    `moqc.quant.allocators.table`; `formats` the candidates, by default those whose costs were measured (pmq:
    its own three). Raises BudgetError, with the reachable range, when no plan is small enough, or when the
    default candidates leave more than a tenth of the budget unspent.
    """

    name: ClassVar[str] = "allocate-bits"
    reads: ClassVar[tuple[Key[Any], ...]] = (COSTS,)
    writes: ClassVar[tuple[Key[Any], ...]] = (BITS,)
    bits: float = 2.5
    allocator: str = "global"
    formats: tuple[str, ...] = ()

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
        problem = self._problem(mod, sites)
        if not self.formats:
            problem.require_spendable()
        solution = find_allocator(self.allocator)(problem)
        _report(self.allocator, problem, solution)
        return BITS.put(mod, plan_of(problem, solution))

    def _problem(self, mod: IRModule, sites: Sequence[ExpertSite]) -> Problem:
        costs = COSTS.get(mod) if self.allocator != "pmq" else None
        formats = tuple(Format.parse(name) for name in self._format_names(costs, sites))
        units = [
            (number, expert, projection)
            for number, site in enumerate(sites)
            for expert in range(site.experts)
            for projection in site.projections
        ]
        shapes = [sites[number].shape(projection) for number, _, projection in units]
        weights = np.array([rows * columns for rows, columns in shapes], dtype=np.int64)
        profile, errors = PROFILE.get(mod), BLOCK_ERRORS.get(mod)
        return Problem(
            sites=tuple(site.site for site in sites),
            unit_site=np.array([number for number, _, _ in units], dtype=np.int64),
            unit_expert=np.array([expert for _, expert, _ in units], dtype=np.int64),
            unit_projection=np.array([PROJECTIONS.index(name) for _, _, name in units], dtype=np.int64),
            formats=formats,
            costs=_costs(costs, sites, units, formats),
            sizes=np.array([[f.stored_bits(*shape) for f in formats] for shape in shapes], dtype=np.int64),
            weights=weights,
            budget_bits=math.floor(self.bits * int(weights.sum())),
            overhead_bits=sum(site.experts * TABLE_BITS for site in sites),
            frequency=None if profile is None else tuple(_frequency(profile[s.site]) for s in sites),
            router_weight=None if profile is None else tuple(_router_weight(profile[s.site]) for s in sites),
            block_errors=None if errors is None else tuple(_block_errors(errors[s.site]) for s in sites),
        )

    def _format_names(self, costs: dict[str, Any] | None, sites: Sequence[ExpertSite]) -> list[str]:
        """Names of the candidates. PipelineError when the costs of one were not measured."""
        if self.allocator == "pmq":
            return list(self.formats or PMQ_FORMATS)
        if costs is None:
            return list(self.formats or FORMATS)
        measured = set.intersection(*(set(costs[s.site][p]) for s in sites for p in s.projections))
        missing = sorted(set(self.formats) - measured)
        if missing:
            raise PipelineError(
                f"{self.name}: no costs for {', '.join(missing)}; measured are {', '.join(sorted(measured))}"
            )
        return list(self.formats or sorted(measured))


def plan_of(problem: Problem, solution: Solution) -> dict[str, dict[str, list[str]]]:
    """`solution` as BITS: site -> projection -> format name of each expert."""
    plan: dict[str, dict[str, list[str]]] = {site: {} for site in problem.sites}
    units = zip(problem.unit_site, problem.unit_projection, solution.choice, strict=True)
    for site, projection, choice in units:  # experts come in order
        names = plan[problem.sites[site]].setdefault(PROJECTIONS[projection], [])
        names.append(str(problem.formats[choice]))
    return plan


def _costs(
    costs: dict[str, Any] | None,
    sites: Sequence[ExpertSite],
    units: Sequence[tuple[int, int, str]],
    formats: Sequence[Format],
) -> NDArray[np.float64]:
    if costs is None:
        return np.zeros((len(units), len(formats)))
    names = [str(fmt) for fmt in formats]
    rows = [[costs[sites[site].site][name][fmt][expert] for fmt in names] for site, expert, name in units]
    return np.array(rows, dtype=np.float64)


def _frequency(profile: dict[str, Any]) -> NDArray[np.float64]:
    pairs = np.array(profile["pairs"], dtype=np.float64)
    share: NDArray[np.float64] = pairs / max(pairs.sum(), 1)
    return share


def _router_weight(profile: dict[str, Any]) -> NDArray[np.float64]:
    mass = np.array(profile["pairs"], dtype=np.float64) * np.array(profile["weight_ppm"], dtype=np.float64)
    per_token: NDArray[np.float64] = mass / 1e6 / max(profile["tokens"], 1)
    return per_token


def _block_errors(errors: dict[str, list[int]]) -> NDArray[np.float64]:
    return np.array([errors[str(bits)] for bits in MCMOE_BITS], dtype=np.float64).T


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
