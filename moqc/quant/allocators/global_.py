"""The least total cost under one budget, over all projections of all experts of all sites at once.

This is the multiple-choice knapsack problem. Its linear relaxation has a closed form: on the lower convex
hull of every unit's (size, cost) points, take the steps of the steepest descent per bit until the budget is
spent (the whole path of the Lagrange multiplier, by sorting instead of bisection). The step that no longer
fits gives a lower bound on every plan's cost; what is left of the budget is filled greedily. With thousands
of units the result is within parts per million of the bound; small problems, where single steps are large,
go to HiGHS besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from moqc.quant.problem import Problem, Solution

CLOSE_ENOUGH = 1e-5
"""Relative gap at which the exact solver is not tried."""
EXACT_VARIABLES = 4000
"""Largest units x formats given to the exact solver."""
EXACT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps along the hulls, steepest first: `unit` goes from format `before` to `after`."""

    unit: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    size: NDArray[np.int64]
    gain: NDArray[np.float64]


def global_(problem: Problem) -> Solution:
    """A plan of least total cost, with the proven `gap` to the optimum.

    Raises BudgetError when the smallest format of every unit does not fit.
    """
    cheapest, steps = _hull_steps(problem)
    rows = np.arange(len(cheapest))
    base = int(problem.sizes[rows, cheapest].sum())
    problem.require(base, int(problem.sizes.max(axis=1).sum()), "these formats")
    left = problem.available_bits - base
    spent = np.cumsum(steps.size)
    taken = int(np.searchsorted(spent, left, side="right"))
    choice = cheapest.copy()
    choice[steps.unit[:taken]] = steps.after[:taken]  # of several steps of a unit the last one stays
    left -= int(spent[taken - 1]) if taken else 0
    bound = float(problem.costs[rows, choice].sum())
    if taken < len(steps.unit):
        bound -= float(steps.gain[taken] / steps.size[taken]) * left
    _fill(problem, choice, steps, taken, left)
    found = problem.solution(choice)
    if _gap(found.cost, bound) > CLOSE_ENOUGH and problem.costs.size <= EXACT_VARIABLES:
        found, bound = _exact(problem, found, bound)
    return problem.solution(found.choice, _gap(found.cost, bound))


def _gap(cost: float, bound: float) -> float:
    """``(cost - bound) / |bound|``; differences that are rounding count as none."""
    excess = cost - bound
    if excess <= 1e-12 * max(abs(cost), abs(bound)):
        return 0.0
    return excess / abs(bound) if bound else float("inf")


def _hull_steps(problem: Problem) -> tuple[NDArray[np.int64], _Steps]:
    """The smallest format of each unit (of equal sizes the better), and all steps along the hulls."""
    cheapest = np.zeros(len(problem.weights), dtype=np.int64)
    found: list[tuple[int, int, int]] = []
    order = np.lexsort((problem.costs, problem.sizes), axis=-1)
    for unit, (sizes, costs, formats) in enumerate(
        zip(problem.sizes.tolist(), problem.costs.tolist(), order.tolist(), strict=True)
    ):
        hull = _hull(sizes, costs, formats)
        cheapest[unit] = hull[0]
        found += [(unit, before, after) for before, after in pairwise(hull)]
    units, before, after = np.array(found, dtype=np.int64).reshape(-1, 3).T
    growth = problem.sizes[units, after] - problem.sizes[units, before]
    gain = problem.costs[units, before] - problem.costs[units, after]
    # Stable, so that the steps of a unit stay in their order even where rounding makes slopes equal.
    ranked = np.argsort(-gain / growth, kind="stable")
    return cheapest, _Steps(units[ranked], before[ranked], after[ranked], growth[ranked], gain[ranked])


def _hull(sizes: list[int], costs: list[float], formats: list[int]) -> list[int]:
    """Those of `formats`, sorted by (size, cost), on the lower convex hull; costs fall along it."""
    hull: list[int] = []
    for index in formats:
        if hull and costs[index] >= costs[hull[-1]]:
            continue
        while len(hull) >= 2:
            first, middle = hull[-2], hull[-1]
            kept = (costs[first] - costs[middle]) * (sizes[index] - sizes[middle])
            if kept > (costs[middle] - costs[index]) * (sizes[middle] - sizes[first]):
                break
            hull.pop()
        hull.append(index)
    return hull


def _fill(problem: Problem, choice: NDArray[np.int64], steps: _Steps, taken: int, left: int) -> None:
    """Spend `left` bits on later steps that fit, then on any format that still helps; changes `choice`."""
    ahead = zip(
        steps.unit[taken:].tolist(),
        steps.before[taken:].tolist(),
        steps.after[taken:].tolist(),
        steps.size[taken:].tolist(),
        strict=True,
    )
    for unit, before, after, size in ahead:
        if size <= left and choice[unit] == before:
            choice[unit] = after
            left -= size
    rows = np.arange(len(choice))
    while True:
        sizes = problem.sizes - problem.sizes[rows, choice][:, None]
        gains = problem.costs[rows, choice][:, None] - problem.costs
        gains[sizes > left] = 0.0
        unit, better = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[unit, better] <= 0:
            return
        left -= int(sizes[unit, better])
        choice[unit] = better


def _exact(problem: Problem, start: Solution, bound: float) -> tuple[Solution, float]:
    """HiGHS on the whole problem: the better of its plan and `start`, and the better lower bound."""
    units, formats = problem.costs.shape
    floor = problem.costs.min(axis=1)
    # Objective and budget in units near 1: the solver's tolerances are absolute.
    scale = max(start.cost - float(floor.sum()), np.finfo(np.float64).tiny)
    grain = int(np.gcd.reduce(problem.sizes, axis=None))
    result = optimize.milp(
        ((problem.costs - floor[:, None]) / scale).reshape(-1),
        integrality=np.ones(units * formats),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(sparse.kron(sparse.eye(units), np.ones((1, formats))), 1, 1),
            optimize.LinearConstraint(
                (problem.sizes // grain).reshape(1, -1), -np.inf, problem.available_bits // grain
            ),
        ],
        options={"mip_rel_gap": CLOSE_ENOUGH / 10, "time_limit": EXACT_SECONDS},
    )
    if result.mip_dual_bound is not None:
        bound = max(bound, float(result.mip_dual_bound) * scale + float(floor.sum()))
    if result.x is None:
        return start, bound
    choice = result.x.reshape(units, formats).argmax(axis=1).astype(np.int64)
    size = int(problem.sizes[np.arange(units), choice].sum())
    if size > problem.available_bits:  # by a tolerance of the solver
        return start, bound
    return min(problem.solution(choice), start, key=lambda solution: solution.cost), bound
