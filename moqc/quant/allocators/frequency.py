"""More bits for the experts that are used most: the heuristic of QuantMoE-Bench (arXiv 2406.08155)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moqc.quant.allocators.ladder import promote, units_of_experts
from moqc.quant.problem import Problem, Solution


def frequency(problem: Problem) -> Solution:
    """Two formats adjacent in size; in every site the hottest experts get the larger.

    All sites get the same number of hot experts; what is left of the budget goes to the next expert of the
    sites where that one is used most. Needs `Problem.frequency` (ValueError). Raises BudgetError when the
    smallest format does not fit.
    """
    if problem.frequency is None:
        raise ValueError("the frequency allocator needs the activation frequency of experts")
    return promote(problem, _hottest_first(problem, problem.frequency), "plans by frequency")


def _hottest_first(problem: Problem, shares: tuple[NDArray[np.float64], ...]) -> list[NDArray[np.int64]]:
    """Units of each expert: by rank within the site, then by share of the site's pairs."""
    entries = []
    for site, share in enumerate(shares):
        ranked = np.argsort(-share, kind="stable")
        entries += [(rank, -float(share[expert]), site, int(expert)) for rank, expert in enumerate(ranked)]
    members = units_of_experts(problem)
    return [members[site, expert] for _, _, site, expert in sorted(entries)]
