"""PMQ, the allocation of MC-MoE (arXiv 2410.06270), as its published code solves it.

For each site separately, with x[i, j] = 1 when expert i gets j bits:

    min   sum_ij  phi_i^alpha * w_i^beta * eps_ij^alpha * x_ij          alpha = 1, beta = 1.5
    s.t.  sum_ij  j * x_ij <= B,   sum_j x_ij = 1,   sum_i x_i3 >= 1,   sum_i x_i2 >= 1,   j in {1, 2, 3}

phi is the activation frequency, w the routing weight (each normalized over the site), eps the change of the
block's output when that expert alone is quantized. The paper has an exponent gamma on eps; the code never
applies it, and that is what produced the published numbers. All projections of an expert share its bits.

MC-MoE's budget B counts codes only. To meet a budget in stored bits, every site gets the same average code
bits k, and the plan is the one of the largest k whose full use fits: B = floor(k * experts). Groups are 128
columns wide, as in MC-MoE.
"""

from __future__ import annotations

from bisect import bisect_right
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from moqc.errors import InternalError
from moqc.quant.allocators.ladder import columns_of
from moqc.quant.problem import MCMOE_BITS, Problem, Solution

ALPHA = 1.0
BETA = 1.5
GROUP = 128


def pmq(problem: Problem) -> Solution:
    """MC-MoE's plan.

    Needs `frequency`, `router_weight`, `block_errors`, and formats int1-, int2- and int3-g128 (ValueError).
    Raises BudgetError when not even one 3-bit, one 2-bit and otherwise 1-bit experts fit in every site.
    """
    if problem.frequency is None or problem.router_weight is None or problem.block_errors is None:
        raise ValueError("pmq needs activation frequency, routing weight and block errors")
    columns = columns_of(problem, MCMOE_BITS, GROUP, "pmq")
    experts = [len(share) for share in problem.frequency]
    if min(experts) < 2:
        raise ValueError("pmq needs two experts a site: one of 3 bits and one of 2")
    budgets = _site_budgets(problem, columns, experts)
    choice = np.zeros(len(problem.weights), dtype=np.int64)
    for site, budget in enumerate(budgets):
        importance = _normalized(problem.frequency[site]) ** ALPHA
        importance *= _normalized(problem.router_weight[site]) ** BETA
        bits = allocate_site(importance[:, None] * problem.block_errors[site] ** ALPHA, budget)
        units = np.flatnonzero(problem.unit_site == site)
        choice[units] = columns[bits[problem.unit_expert[units]] - 1]
    return problem.solution(choice)


def allocate_site(coefficients: NDArray[np.float64], budget: int) -> NDArray[np.int64]:
    """Bits of each expert (int64 [E]) with the least sum of `coefficients` [E, 3] in `budget` code bits."""
    experts, widths = coefficients.shape
    scale = coefficients.max()
    objective = (coefficients / scale if scale > 0 else coefficients).reshape(-1)
    one_each = sparse.kron(sparse.eye(experts), np.ones((1, widths)))
    total = np.tile(np.array(MCMOE_BITS, dtype=np.float64), experts)[None]
    any_of = np.array([np.tile([0.0, float(bits == 2), float(bits == 3)], experts) for bits in (2, 3)])
    result = optimize.milp(
        objective,
        integrality=np.ones(experts * widths),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_each, 1, 1),
            optimize.LinearConstraint(total, -np.inf, budget),
            optimize.LinearConstraint(any_of, 1, np.inf),
        ],
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise InternalError(f"PMQ has no solution for {experts} experts and {budget} bits: {result.message}")
    chosen: NDArray[np.int64] = result.x.reshape(experts, widths).argmax(axis=1) + 1
    return chosen


def _normalized(values: NDArray[np.float64]) -> NDArray[np.float64]:
    total = values.sum()
    return values / total if total > 0 else np.full(len(values), 1 / len(values))


def _site_budgets(problem: Problem, columns: NDArray[np.int64], experts: list[int]) -> list[int]:
    """Code bits of each site for the largest average k that fits.

    At a fixed group the size of a matrix is affine in its bits, so a site's size depends on their sum only:
    that of 1 bit for all, plus a step for every bit more.
    """
    one, two = problem.sizes[:, columns[0]], problem.sizes[:, columns[1]]
    base = int(one.sum())
    steps = [int((two - one)[problem.unit_site == site].sum()) // count for site, count in enumerate(experts)]

    def budgets(average: Fraction) -> list[int]:
        return [min(max(int(average * count), count + 3), 3 * count - 1) for count in experts]

    def size(average: Fraction) -> int:
        spent = zip(budgets(average), experts, steps, strict=True)
        return base + sum((bits - count) * step for bits, count, step in spent)

    averages = sorted({Fraction(bits, count) for count in set(experts) for bits in range(count, 3 * count)})
    problem.require(size(averages[0]), size(averages[-1]), "PMQ plans")
    return budgets(averages[bisect_right(averages, problem.available_bits, key=size) - 1])
