"""MxMoE (arXiv 2505.05799): per block, the least L^r * T^(1-r) over single linears.

    L = sum_u Delta_u,j(u)     Delta: norm of the change of the block's output with linear u in format j
    T = sum_u t_u,j(u)         t: time of the linear in that format

under a budget of memory for every block, each linear in one of w1..w4, groups of 128, asymmetric. MxMoE takes
r = 1 for weight-only formats, where time follows memory, and 0.75 where it has profiled times; so does this:
0.75 when the problem has latencies. With r < 1 the objective is concave in (L, T), and every step of
``min r L / L_0 + (1 - r) T / T_0`` at the plan before (L_0, T_0) lowers it; steps go on while they help, from
the plans of least L and of least T.

Every block gets the same share of the budget in stored bits a weight.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from moqc.quant.allocators.global_ import global_
from moqc.quant.problem import Problem, Solution

ERROR_EXPONENT = 0.75
"""r where times are known."""


def mxmoe(problem: Problem) -> Solution:
    """MxMoE's plan, site by site.

    Reads `Problem.costs` as squared changes of a block's output, whose roots are Delta, and `latency` if
    there. Raises BudgetError when the smallest format of every unit does not fit.
    """
    problem.require(int(problem.sizes.min(1).sum()), int(problem.sizes.max(1).sum()), "MxMoE plans")
    choice = np.zeros(len(problem.weights), dtype=np.int64)
    total = int(problem.weights.sum())
    for site in range(len(problem.sites)):
        units = np.flatnonzero(problem.unit_site == site)
        share = problem.available_bits * int(problem.weights[units].sum()) // total
        choice[units] = _site(problem.part(units, share))
    return problem.solution(choice)


def _site(part: Problem) -> NDArray[np.int64]:
    errors = np.sqrt(part.costs)
    by_error = global_(replace(part, costs=errors)).choice
    times = part.latency
    if times is None:
        return by_error
    part = replace(part, latency=None, latency_budget=None)
    starts = (by_error, global_(replace(part, costs=times)).choice)
    found = [_descend(part, errors, times, start) for start in starts]
    return min(found, key=lambda choice: _objective(errors, times, choice))


def _descend(
    part: Problem, errors: NDArray[np.float64], times: NDArray[np.float64], choice: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The plan at which linearizing the objective no longer lowers it."""
    while True:
        error, time = _sums(errors, times, choice)
        slopes = ERROR_EXPONENT / max(error, 1e-300) * errors + (1 - ERROR_EXPONENT) / time * times
        better = global_(replace(part, costs=slopes)).choice
        if _objective(errors, times, better) >= _objective(errors, times, choice):
            return choice
        choice = better


def _objective(errors: NDArray[np.float64], times: NDArray[np.float64], choice: NDArray[np.int64]) -> float:
    error, time = _sums(errors, times, choice)
    return float(error**ERROR_EXPONENT * time ** (1 - ERROR_EXPONENT))


def _sums(
    errors: NDArray[np.float64], times: NDArray[np.float64], choice: NDArray[np.int64]
) -> tuple[float, float]:
    rows = np.arange(len(choice))
    return float(errors[rows, choice].sum()), float(times[rows, choice].sum())
