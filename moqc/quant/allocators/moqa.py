"""MoQa (arXiv 2503.21135; DynaMo in its third version): clusters of experts by significance.

Fuzzy c-means on the experts' significances x_i, c = 4 clusters, fuzzifier m = 2:

    u_ik = 1 / sum_j (|x_i - v_k| / |x_i - v_j|)^(2 / (m - 1)),    v_k = sum_i u_ik^m x_i / sum_i u_ik^m

until the memberships stand still. Clusters, ordered by center, get 2, 4, 6 and 8 bits; an expert at a
boundary gets the lower precision ("low-precision-first"). A significance is an expert's share of its block's
channel energy, averaged over the datasets (the paper's diagonal of the joint distribution), times the number
of experts, so that blocks can be clustered together.

The paper's sizes are an outcome. To meet a budget, an expert gets the precision of the highest cluster that
it belongs to, or above, with a membership of at least tau in all; tau is the smallest for which the plan
fits. 0.5 would be the plain rule, more is more low-precision-first. When not even 2 bits for all fit, the
clusters get 1, 2, 3 and 4 bits.
"""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from moqc.quant.allocators.ladder import columns_of, units_of_experts
from moqc.quant.problem import Problem, Solution

CLUSTERS = 4
FUZZIFIER = 2.0
TOLERANCE = 1e-6
ROUNDS = 300
GROUP = 128
BITS = (2, 4, 6, 8)
SMALL_BITS = (1, 2, 3, 4)


def moqa(problem: Problem) -> Solution:
    """MoQa's clustering of experts, low-precision-first.

    Needs `Problem.significance` and the formats of `BITS` and `SMALL_BITS` in groups of 128 (ValueError).
    Raises BudgetError when one bit for all does not fit.
    """
    if problem.significance is None:
        raise ValueError("moqa needs the significance of experts")
    members = units_of_experts(problem)
    values = np.array([problem.significance[s][e] * len(problem.significance[s]) for s, e in members])
    above = membership_above(fuzzy_c_means(values))
    columns = columns_of(problem, BITS, GROUP, "moqa")
    if int(problem.sizes[:, columns[0]].sum()) > problem.available_bits:
        columns = columns_of(problem, SMALL_BITS, GROUP, "moqa")
    sizes = problem.sizes[:, columns].sum(axis=0)
    problem.require(int(sizes[0]), int(sizes[-1]), "MoQa plans")
    of_unit = _expert_of_unit(list(members.values()), len(problem.weights))
    # Sizes fall as the threshold rises; above all memberships everything is in the lowest cluster.
    thresholds = [*np.unique(above).tolist(), 2.0]

    def plan(threshold: float) -> NDArray[np.int64]:
        clusters = (above >= threshold).sum(axis=1)
        found: NDArray[np.int64] = columns[clusters[of_unit]]
        return found

    def left(threshold: float) -> int:
        return problem.available_bits - int(problem.sizes[np.arange(len(of_unit)), plan(threshold)].sum())

    at = bisect_left(range(len(thresholds)), 0, key=lambda index: left(thresholds[index]))
    return problem.solution(plan(thresholds[at]))


def fuzzy_c_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Memberships [N, CLUSTERS] of `values` [N], clusters by ascending center; rows sum to 1.

    Centers start at evenly spaced quantiles. A value on a center belongs to it alone (in equal parts to all
    that coincide there).
    """
    centers = np.quantile(values, (np.arange(CLUSTERS) + 0.5) / CLUSTERS)
    memberships = _memberships(values, centers)
    for _ in range(ROUNDS):
        mass = memberships**FUZZIFIER
        total = mass.sum(axis=0)
        centers = np.where(total > 0, values @ mass / np.where(total > 0, total, 1.0), centers)
        updated = _memberships(values, centers)
        moved = float(np.abs(updated - memberships).max())
        memberships = updated
        if moved < TOLERANCE:
            break
    found: NDArray[np.float64] = memberships[:, np.argsort(centers, kind="stable")]
    return found


def _memberships(values: NDArray[np.float64], centers: NDArray[np.float64]) -> NDArray[np.float64]:
    distances = np.abs(values[:, None] - centers[None])
    hits = distances == 0
    with np.errstate(divide="ignore"):
        weights = distances ** (-2 / (FUZZIFIER - 1))
    weights = np.where(hits.any(axis=1, keepdims=True), hits.astype(np.float64), weights)
    found: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return found


def membership_above(memberships: NDArray[np.float64]) -> NDArray[np.float64]:
    """Membership [N, CLUSTERS - 1] in cluster 1 or above, 2 or above, and so on."""
    found: NDArray[np.float64] = np.cumsum(memberships[:, ::-1], axis=1)[:, ::-1][:, 1:].clip(0, 1)
    return found


def _expert_of_unit(members: list[NDArray[np.int64]], units: int) -> NDArray[np.int64]:
    found = np.zeros(units, dtype=np.int64)
    for expert, mine in enumerate(members):
        found[mine] = expert
    return found
