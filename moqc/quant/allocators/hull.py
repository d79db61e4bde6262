"""The linear relaxation of the multiple-choice knapsack, in closed form.

On the lower convex hull of every unit's (size, cost) points, take the steps of steepest descent per bit until
the budget is spent: the whole path of the Lagrange multiplier, by sorting instead of bisection. The step that
no longer fits gives a lower bound on every plan's cost.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqc.quant.problem import Problem


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps along the hulls, steepest first: `unit` goes from format `before` to `after`."""

    unit: NDArray[np.int64]
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    size: NDArray[np.int64]
    gain: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Relaxation:
    """Whole steps that fit: their plan `choice` int64 [U], `left` unspent bits, and what is proven.

    `bound`: no plan costs less. `slope`: the multiplier, cost a bit at the end. `taken`: steps in it.
    """

    choice: NDArray[np.int64]
    left: int
    bound: float
    slope: float
    steps: Steps
    taken: int


def relax(problem: Problem) -> Relaxation:
    """Solve the relaxation. Raises BudgetError when the smallest format of every unit does not fit."""
    cheapest, steps = hull_steps(problem)
    rows = np.arange(len(cheapest))
    base = int(problem.sizes[rows, cheapest].sum())
    largest = np.where(problem.permitted, problem.sizes, 0).max(axis=1)
    problem.require(base, int(largest.sum()), "these formats")
    left = problem.available_bits - base
    spent = np.cumsum(steps.size)
    taken = int(np.searchsorted(spent, left, side="right"))
    choice = cheapest.copy()
    choice[steps.unit[:taken]] = steps.after[:taken]  # of several steps of a unit the last one stays
    left -= int(spent[taken - 1]) if taken else 0
    bound = float(problem.costs[rows, choice].sum())
    slope = float(steps.gain[taken] / steps.size[taken]) if taken < len(steps.unit) else 0.0
    return Relaxation(choice, left, bound - slope * left, slope, steps, taken)


def hull_steps(problem: Problem) -> tuple[NDArray[np.int64], Steps]:
    """The smallest format of each unit (of equal sizes the better), and all steps along the hulls."""
    rows = np.arange(len(problem.weights))
    sizes = np.where(problem.permitted, problem.sizes, np.iinfo(np.int64).max)
    least = sizes.min(axis=1, keepdims=True)
    cheapest = np.where(sizes == least, problem.costs, np.inf).argmin(axis=1)
    current, limit = cheapest.copy(), np.full(len(rows), np.inf)
    parts: list[tuple[NDArray[np.int64], ...]] = []
    slopes: list[NDArray[np.float64]] = []
    while True:
        growth = problem.sizes - problem.sizes[rows, current][:, None]
        gain = problem.costs[rows, current][:, None] - problem.costs
        useful = problem.permitted & (growth > 0) & (gain > 0)
        slope = np.divide(gain, growth, out=np.zeros_like(gain), where=useful)
        best = slope.max(axis=1)
        units = np.flatnonzero(best > 0)
        if not len(units):
            break
        # Of several formats on one line the largest is the next corner.
        after = np.where(slope == best[:, None], growth, -1).argmax(axis=1)
        limit = np.minimum(limit, best)  # slopes fall along a hull, except by rounding
        parts.append((units, current[units], after[units]))
        slopes.append(limit[units])
        current[units] = after[units]
    if not parts:
        empty = np.zeros(0, dtype=np.int64)
        return cheapest, Steps(empty, empty, empty, empty, np.zeros(0))
    unit, before, after = (np.concatenate(part) for part in zip(*parts, strict=True))
    size = problem.sizes[unit, after] - problem.sizes[unit, before]
    # Stable, so that the steps of a unit stay in their order even where rounding makes slopes equal.
    ranked = np.argsort(-np.concatenate(slopes), kind="stable")
    gain = problem.costs[unit, before] - problem.costs[unit, after]
    return cheapest, Steps(unit[ranked], before[ranked], after[ranked], size[ranked], gain[ranked])
