"""What heuristic allocators share: formats in order of size, promotion of units until a budget is spent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from moqc.quant.problem import Problem, Solution


def ladder(problem: Problem) -> list[int]:
    """Indices of formats by size, without those that cost more than a smaller one."""
    sizes, costs = problem.sizes.sum(axis=0), problem.costs.sum(axis=0)
    steps: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (sizes[index], costs[index])):
        if not steps or (sizes[index] > sizes[steps[-1]] and costs[index] <= costs[steps[-1]]):
            steps.append(index)
    return steps


def promote(problem: Problem, order: Iterable[NDArray[np.int64]], family: str) -> Solution:
    """Two formats adjacent in size; the groups of units in `order` get the larger while the budget lasts.

    The smaller is the largest that fits for all units. Raises BudgetError, naming the `family` of plans, when
    the smallest format does not fit.
    """
    steps = ladder(problem)
    sizes = problem.sizes.sum(axis=0)
    problem.require(int(sizes[steps[0]]), int(sizes[steps[-1]]), family)
    fitting = [step for step, index in enumerate(steps) if sizes[index] <= problem.available_bits]
    low, high = steps[fitting[-1]], steps[min(fitting[-1] + 1, len(steps) - 1)]
    choice = np.full(len(problem.weights), low, dtype=np.int64)
    growth = problem.sizes[:, high] - problem.sizes[:, low]
    left = problem.available_bits - int(sizes[low])
    for units in order:
        needed = int(growth[units].sum())
        if needed > left:
            break
        choice[units] = high
        left -= needed
    return problem.solution(choice)


def units_of_experts(problem: Problem) -> dict[tuple[int, int], NDArray[np.int64]]:
    """(site, expert) -> its units."""
    members: dict[tuple[int, int], list[int]] = {}
    for unit, key in enumerate(zip(problem.unit_site.tolist(), problem.unit_expert.tolist(), strict=True)):
        members.setdefault(key, []).append(unit)
    return {key: np.array(units, dtype=np.int64) for key, units in members.items()}


def columns_of(problem: Problem, bits: Sequence[int], group: int, allocator: str) -> NDArray[np.int64]:
    """Index in `problem.formats` of the asymmetric format of each width. ValueError when one is missing."""
    names = {(fmt.bits, fmt.group, fmt.symmetric): index for index, fmt in enumerate(problem.formats)}
    missing = [width for width in bits if (width, group, False) not in names]
    if missing:
        raise ValueError(f"{allocator} needs the format int{missing[0]}-g{group}")
    return np.array([names[width, group, False] for width in bits], dtype=np.int64)
