"""More bits for whole blocks, or single linears, that a data-light score calls important.

`block_importance` and `outlier_score` are QuantMoE-Bench's (arXiv 2406.08155, github.com/UNITES-Lab/
moe-quantization), which gives the best-scored ones 4 bits and the others 2. `ewq` is EWQ's (arXiv
2503.04704), which keeps blocks of high entropy raw and gives the others 8 or 4 bits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from moqc.quant.allocators.ladder import ladder, promote
from moqc.quant.problem import Problem, Solution


def block_importance(problem: Problem) -> Solution:
    """Two formats adjacent in size; the blocks that turn the residual stream most get the larger.

    The score is ``1 - cosine similarity`` of the stream before and after the block; whole sites are promoted
    in its order while the budget lasts. Needs `Problem.similarity` (ValueError). Raises BudgetError when the
    smallest format does not fit.
    """
    if problem.similarity is None:
        raise ValueError("block-importance needs the similarity of each block's input and output")
    order = np.argsort(problem.similarity, kind="stable")
    groups = (np.flatnonzero(problem.unit_site == site) for site in order)
    return promote(problem, groups, "plans by block importance")


def outlier_score(problem: Problem) -> Solution:
    """Two formats adjacent in size; the linears with the strongest outliers get the larger.

    The score of a matrix is ``max_j (max_i |W_ij| / mean_i |W_ij|)`` over its input channels j. Needs
    `Problem.outliers` (ValueError). Raises BudgetError when the smallest format does not fit.
    """
    if problem.outliers is None:
        raise ValueError("outlier-score needs the outlier scores of the units")
    order = np.argsort(-problem.outliers, kind="stable")
    return promote(problem, order.reshape(-1, 1), "plans by outlier score")


def ewq(problem: Problem) -> Solution:
    """Three formats adjacent in size by the entropy H of a block's weights, T = mean - X * deviation of H.

    ``H >= mean`` gets the largest, ``T <= H < mean`` the middle one, ``H < T`` the smallest. EWQ's formats
    are raw, 8 and 4 bits and X is chosen by hand; here the three formats and X are those of the largest plan
    that fits (the formats at the ends stand for what would lie beyond them). Needs
    `Problem.entropy` (ValueError). Raises BudgetError when the smallest format does not fit.
    """
    if problem.entropy is None:
        raise ValueError("ewq needs the entropy of each block's weights")
    entropy, steps = problem.entropy, ladder(problem)
    below = np.sort(entropy[entropy < entropy.mean()])
    ends = [steps[0], steps[0], *steps, steps[-1], steps[-1]]
    # Every X between two blocks' entropies gives the same plan: T at each of them, and above all.
    thresholds = [*below.tolist(), float(entropy.mean())]
    plans = [
        _by_entropy(problem, entropy, threshold, [ends[top + 2 - down] for down in (2, 1, 0)])
        for top in range(len(ends) - 2)
        for threshold in thresholds
    ]
    sizes = [int(np.take_along_axis(problem.sizes, plan[:, None], 1).sum()) for plan in plans]
    problem.require(min(sizes), max(sizes), "plans by entropy")
    best = max((size, at) for at, size in enumerate(sizes) if size <= problem.available_bits)[1]
    return problem.solution(plans[best])


def _by_entropy(
    problem: Problem, entropy: NDArray[np.float64], threshold: float, formats: list[int]
) -> NDArray[np.int64]:
    low, middle, high = formats
    of_site = np.where(entropy >= entropy.mean(), high, np.where(entropy >= threshold, middle, low))
    return of_site[problem.unit_site]
