"""At most so many formats a site: which ones, by a Lagrange multiplier on the bits.

For a price of a bit, every site takes the set of formats in which its units' least ``cost + price * size``
add up to the least. The price is bisected until the sizes fit. The sum of these minima, less the price of the
budget, bounds every plan from below, for every price. Sites differ little in what a set more or less is
worth, so near the final price single sites are then tried with their next best sets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from moqc.quant.allocators.hull import relax
from moqc.quant.problem import Problem

PRICE_STEPS = 40
"""Halvings of the interval of the price, on a logarithmic scale."""
TRIALS = 60
"""Other sets tried for single sites at the final price."""
GOOD_ENOUGH = 1e-3
"""Relative gap at which they are not."""


@dataclass(frozen=True)
class _Sets:
    """All sets of formats with as many members as are allowed: `members` bool [N, F]."""

    problem: Problem
    members: NDArray[np.bool_]

    @classmethod
    def of(cls, problem: Problem, limit: int) -> _Sets:
        count = len(problem.formats)
        chosen = combinations(range(count), min(limit, count))
        return cls(problem, np.array([[at in members for at in range(count)] for members in chosen]))

    def values(self, price: float) -> NDArray[np.float64]:
        """Least priced cost [S, N] of every site with every set; infinite where a unit has none of it."""
        priced = np.where(self.problem.permitted, self.problem.costs + price * self.problem.sizes, np.inf)
        sites = len(self.problem.sites)
        columns = []
        for members in self.members:
            least = priced[:, members].min(axis=1)
            columns.append(np.bincount(self.problem.unit_site, least, minlength=sites))
        return np.stack(columns, axis=1)

    def restricted(self, chosen: NDArray[np.int64]) -> Problem:
        """The problem in which site s takes formats of set chosen[s] only."""
        allowed = self.members[chosen][self.problem.unit_site] & self.problem.permitted
        return replace(self.problem, allowed=allowed, max_classes=None)


def limit_classes(problem: Problem) -> tuple[Problem, float]:
    """The problem restricted to `max_classes` formats a site, and a lower bound on every such plan's cost.

    Raises BudgetError when the smallest format of every unit does not fit.
    """
    if problem.max_classes is None or problem.max_classes < 1:
        raise ValueError("a limit on classes is at least 1")
    sets = _Sets.of(problem, problem.max_classes)
    relax(replace(problem, max_classes=None))  # BudgetError where nothing fits
    scale = max(float(problem.costs.max()), 1e-300) / float(problem.sizes.min())
    low, high, bound = scale * 1e-12, scale * 10, -np.inf
    for _ in range(PRICE_STEPS):
        price = float(np.sqrt(low * high))
        values = sets.values(price)
        bound = max(bound, float(values.min(axis=1).sum()) - price * problem.available_bits)
        if _fits(sets.restricted(values.argmin(axis=1)), price):
            high = price
        else:
            low = price
    values = sets.values(high)
    chosen = values.argmin(axis=1)
    if _cost(sets.restricted(chosen)) - bound > GOOD_ENOUGH * abs(bound):
        chosen = _improve(sets, values, chosen)
    return sets.restricted(chosen), bound


def _fits(restricted: Problem, price: float) -> bool:
    priced = np.where(restricted.permitted, restricted.costs + price * restricted.sizes, np.inf)
    choice = priced.argmin(axis=1)
    total = int(restricted.sizes[np.arange(len(choice)), choice].sum())
    return total <= restricted.available_bits


def _improve(sets: _Sets, values: NDArray[np.float64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    """Change the set of one site at a time where the plan that follows costs less."""
    best = _cost(sets.restricted(chosen))
    excess = values - values.min(axis=1, keepdims=True)
    order = np.argsort(excess, axis=None, kind="stable")[len(chosen) :]
    for flat in order[:TRIALS]:
        site, option = np.unravel_index(flat, excess.shape)
        if not np.isfinite(excess[site, option]):
            break
        tried = chosen.copy()
        tried[site] = option
        cost = _cost(sets.restricted(tried))
        if cost < best:
            best, chosen = cost, tried
    return chosen


def _cost(restricted: Problem) -> float:
    """Cost of the relaxation's plan: an estimate good enough to compare sets by."""
    sizes = np.where(restricted.permitted, restricted.sizes, np.iinfo(np.int64).max)
    if int(sizes.min(axis=1).sum()) > restricted.available_bits:
        return float("inf")
    return relax(restricted).bound
