"""The least total cost under one budget, over all units of the model at once.

The multiple-choice knapsack problem. Its linear relaxation (`hull`) gives a plan whose last step may not fit,
and a lower bound; what is left of the budget is filled greedily. With thousands of units the result is within
parts per million of the bound; small problems, where single steps are large, go to HiGHS besides.

Two more constraints are met by Lagrange multipliers, with the bound that duality gives:

* `Problem.latency_budget`: costs become ``cost + mu * latency`` with the least mu whose plan is fast enough.
* `Problem.max_classes`: in `classes`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from moqc.errors import BudgetError, InternalError
from moqc.quant.allocators.classes import limit_classes
from moqc.quant.allocators.hull import Relaxation, relax
from moqc.quant.problem import Problem, Solution

CLOSE_ENOUGH = 1e-5
"""Relative gap at which the exact solver is not tried."""
EXACT_VARIABLES = 4000
"""Largest units x formats given to the exact solver."""
EXACT_SECONDS = 20.0
MULTIPLIER_STEPS = 40
"""Halvings of the interval of the multiplier on latency, unless the gap is small enough before."""
DOUBLINGS = 20
"""Times the multiplier on latency is raised sixteenfold to find one whose plan is fast enough."""
LATENCY_GAP = 1e-3
"""Relative gap at which they end."""


def global_(problem: Problem) -> Solution:
    """A plan of least total cost, with the proven `gap` to the optimum.

    Raises BudgetError when the smallest format of every unit does not fit, or no plan is fast enough.
    """
    if problem.latency is not None and problem.latency_budget is not None:
        return _within_latency(problem, problem.latency, problem.latency_budget)
    found, bound = _within_memory(problem)
    return problem.solution(found.choice, _gap(found.cost, bound))


def _within_memory(problem: Problem) -> tuple[Solution, float]:
    """The best plan found and a lower bound, latency aside."""
    if problem.max_classes is not None:
        limited, bound = limit_classes(problem)
        return _greedy(limited, relax(limited)), bound
    relaxed = relax(problem)
    found, bound = _greedy(problem, relaxed), relaxed.bound
    if _gap(found.cost, bound) > CLOSE_ENOUGH and problem.costs.size <= EXACT_VARIABLES:
        found, bound = _exact(problem, found, bound)
    return found, bound


def _within_latency(problem: Problem, latency: NDArray[np.float64], budget: float) -> Solution:
    """Bisection on the multiplier of latency; every multiplier tried gives a bound."""
    rows = np.arange(len(problem.weights))
    plain = replace(problem, latency_budget=None)
    best: Solution | None = None
    bound = -np.inf

    def attempt(multiplier: float) -> bool:
        nonlocal best, bound
        priced = replace(plain, costs=problem.costs + multiplier * latency)
        found, lower = _within_memory(priced)
        bound = max(bound, lower - multiplier * budget)
        fits = float(latency[rows, found.choice].sum()) <= budget
        if fits:
            candidate = problem.solution(found.choice)
            best = candidate if best is None or candidate.cost < best.cost else best
        return fits

    high = 0.0
    if not attempt(0.0):
        fastest, _ = _within_memory(replace(plain, costs=latency))
        least = float(latency[rows, fastest.choice].sum())
        if least > budget:
            raise BudgetError(
                f"{budget:g} us a token are out of reach: the fastest plan in these bits takes {least:g} us; "
                "allow more time or more bits"
            )
        best = problem.solution(fastest.choice)
        high = max(float(problem.costs.max()), 1e-300) / max(budget / len(rows), 1e-300)
        for _ in range(DOUBLINGS):
            if attempt(high):
                break
            high *= 16
    low = 0.0
    for _ in range(MULTIPLIER_STEPS if high else 0):
        middle = (low + high) / 2 if low else high / 16
        low, high = (low, middle) if attempt(middle) else (middle, high)
        if best is not None and _gap(best.cost, bound) <= LATENCY_GAP:
            break
    if best is None:
        raise InternalError("no plan was found for a budget of time that can be kept")
    return problem.solution(best.choice, _gap(best.cost, bound))


def _gap(cost: float, bound: float) -> float:
    """``(cost - bound) / |bound|``; differences that are rounding count as none."""
    excess = cost - bound
    if excess <= 1e-12 * max(abs(cost), abs(bound)):
        return 0.0
    return excess / abs(bound) if bound else float("inf")


def _greedy(problem: Problem, relaxed: Relaxation) -> Solution:
    """The relaxation's whole steps, then later steps that fit, then any format that still helps."""
    choice, left, steps = relaxed.choice.copy(), relaxed.left, relaxed.steps
    ahead = zip(
        steps.unit[relaxed.taken :].tolist(),
        steps.before[relaxed.taken :].tolist(),
        steps.after[relaxed.taken :].tolist(),
        steps.size[relaxed.taken :].tolist(),
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
        gains[(sizes > left) | ~problem.permitted] = 0.0
        unit, better = np.unravel_index(int(gains.argmax()), gains.shape)
        if gains[unit, better] <= 0:
            return problem.solution(choice)
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
        bounds=optimize.Bounds(0, problem.permitted.reshape(-1).astype(np.float64)),
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
