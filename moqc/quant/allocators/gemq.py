"""GEMQ (arXiv 2605.23078, github.com/jndeng/GEMQ): one bit-width an expert, all blocks under one budget.

    min   sum_lij c_lij x_lij
    s.t.  sum_lij size_lij x_lij <= budget,  sum_j x_lij = 1,  j in {1, 2, 3}
          sum_i x_li3 >= 1,  sum_i x_li2 >= 1   for every block l  (its "c2c3")

``c_lij`` weighs the squared error of the block's output, with expert i of block l alone rounded to j bits as
MC-MoE does, by the squared gradient of the loss there. GEMQ's budget counts codes; here it is stored bits.
Its fine-tuning of the routers and the progressive repetition are not part of the allocation.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from moqc.errors import InternalError
from moqc.quant.allocators.ladder import columns_of, units_of_experts
from moqc.quant.problem import MCMOE_BITS, Problem, Solution

GROUP = 128
RELATIVE_GAP = 1e-5
SECONDS = 20.0


def gemq(problem: Problem) -> Solution:
    """GEMQ's plan, by HiGHS in place of Gurobi.

    Needs `gradient_errors`, and formats int1-, int2- and int3-g128 (ValueError). Raises BudgetError when not
    even one 3-bit, one 2-bit and otherwise 1-bit experts fit in every site.
    """
    if problem.gradient_errors is None:
        raise ValueError("gemq needs the gradient-weighted errors of experts")
    columns = columns_of(problem, MCMOE_BITS, GROUP, "gemq")
    members = units_of_experts(problem)
    costs = np.array([problem.gradient_errors[site][expert] for site, expert in members])
    sizes = np.array([problem.sizes[units][:, columns].sum(axis=0) for units in members.values()])
    sites = np.array([site for site, _ in members])
    least = sum(_least(sizes[sites == site]) for site in np.unique(sites))
    problem.require(least, int(sizes[:, -1].sum()), "GEMQ plans")
    chosen = solve(costs, sizes, sites, problem.available_bits)
    choice = np.zeros(len(problem.weights), dtype=np.int64)
    for units, column in zip(members.values(), columns[chosen], strict=True):
        choice[units] = column
    return problem.solution(choice)


def solve(
    costs: NDArray[np.float64], sizes: NDArray[np.int64], sites: NDArray[np.int64], budget: int
) -> NDArray[np.int64]:
    """Column of each expert (int64 [N]) of least summed `costs` [N, 3] within `budget` of `sizes` [N, 3].

    In every one of `sites` (int64 [N]) at least one expert takes column 1 and one takes column 2.
    """
    count, widths = costs.shape
    scale, grain = costs.max() or 1.0, int(np.gcd.reduce(sizes, axis=None))
    block = sparse.csr_array((np.ones(count), (np.unique(sites, return_inverse=True)[1], np.arange(count))))
    at_least = [sparse.kron(block, np.eye(widths)[[column]]) for column in (1, 2)]
    result = optimize.milp(
        (costs / scale).reshape(-1),
        integrality=np.ones(count * widths),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(sparse.kron(sparse.eye(count), np.ones((1, widths))), 1, 1),
            optimize.LinearConstraint((sizes / grain).reshape(1, -1), -np.inf, budget // grain),
            *(optimize.LinearConstraint(matrix, 1, np.inf) for matrix in at_least),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": SECONDS},
    )
    if result.x is None:
        raise InternalError(f"GEMQ has no solution for {count} experts and {budget} bits: {result.message}")
    chosen: NDArray[np.int64] = result.x.reshape(count, widths).argmax(axis=1)
    return chosen


def _least(sizes: NDArray[np.int64]) -> int:
    """Least size of a site with one expert in each of the two larger columns."""
    if len(sizes) < 2:
        raise ValueError("gemq needs two experts a site: one of 3 bits and one of 2")
    growth = sizes - sizes[:, :1]
    pairs = growth[:, 1][:, None] + growth[:, 2][None]
    np.fill_diagonal(pairs, np.iinfo(np.int64).max)
    return int(sizes[:, 0].sum() + pairs.min())
