"""One format for every unit."""

from __future__ import annotations

import numpy as np

from moqc.quant.problem import Problem, Solution


def uniform(problem: Problem) -> Solution:
    """The format of lowest total cost among those that fit; of equal costs (or none measured), the largest.

    Raises BudgetError when no format fits.
    """
    sizes, costs = problem.sizes.sum(axis=0), problem.costs.sum(axis=0)
    problem.require(int(sizes.min()), int(sizes.max()), "uniform plans")
    fitting = np.flatnonzero(sizes <= problem.available_bits)
    best = min(fitting, key=lambda index: (costs[index], -sizes[index]))
    return problem.solution(np.full(len(problem.weights), best, dtype=np.int64))
