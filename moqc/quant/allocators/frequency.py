"""More bits for the experts that are used most: the heuristic of QuantMoE-Bench (arXiv 2406.08155)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moqc.quant.problem import Problem, Solution


def frequency(problem: Problem) -> Solution:
    """Two formats adjacent in size; in every site the hottest experts get the larger.

    All sites get the same number of hot experts; what is left of the budget goes to the next expert of the
    sites where that one is used most. Needs `Problem.frequency` (ValueError). Raises BudgetError when the
    smallest format does not fit.
    """
    if problem.frequency is None:
        raise ValueError("the frequency allocator needs the activation frequency of experts")
    ladder = _ladder(problem)
    sizes = problem.sizes.sum(axis=0)
    problem.require(int(sizes[ladder[0]]), int(sizes[ladder[-1]]), "plans by frequency")
    fitting = [step for step, index in enumerate(ladder) if sizes[index] <= problem.available_bits]
    low, high = ladder[fitting[-1]], ladder[min(fitting[-1] + 1, len(ladder) - 1)]
    choice = np.full(len(problem.weights), low, dtype=np.int64)
    growth = problem.sizes[:, high] - problem.sizes[:, low]
    left = problem.available_bits - int(sizes[low])
    for units in _hottest_first(problem, problem.frequency):
        needed = int(growth[units].sum())
        if needed > left:
            break
        choice[units] = high
        left -= needed
    return problem.solution(choice)


def _ladder(problem: Problem) -> list[int]:
    """Formats by size, without those that cost more than a smaller one."""
    sizes, costs = problem.sizes.sum(axis=0), problem.costs.sum(axis=0)
    ladder: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (sizes[index], costs[index])):
        if not ladder or (sizes[index] > sizes[ladder[-1]] and costs[index] <= costs[ladder[-1]]):
            ladder.append(index)
    return ladder


def _hottest_first(problem: Problem, shares: tuple[NDArray[np.float64], ...]) -> list[NDArray[np.int64]]:
    """Units of each expert: by rank within the site, then by share of the site's pairs."""
    entries = []
    for site, share in enumerate(shares):
        ranked = np.argsort(-share, kind="stable")
        entries += [(rank, -float(share[expert]), site, int(expert)) for rank, expert in enumerate(ranked)]
    members: dict[tuple[int, int], list[int]] = {}
    for unit, key in enumerate(zip(problem.unit_site.tolist(), problem.unit_expert.tolist(), strict=True)):
        members.setdefault(key, []).append(unit)
    return [np.array(members[site, expert], dtype=np.int64) for _, _, site, expert in sorted(entries)]
