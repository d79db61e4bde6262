"""The published allocators against brute force and closed forms on small problems."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from moqc.quant.allocators.blocks import block_importance, ewq, outlier_score
from moqc.quant.allocators.gemq import solve
from moqc.quant.allocators.moqa import fuzzy_c_means, membership_above, moqa
from moqc.quant.allocators.mxmoe import ERROR_EXPONENT, mxmoe
from moqc.quant.formats import Format
from moqc.quant.problem import Problem

G128 = tuple(Format(bits, 128) for bits in (1, 2, 3, 4, 6, 8))


def blocks(bits: float, *, sites: int = 2, experts: int = 3, projections: int = 1) -> Problem:
    """Equal units of 128 x 128 with costs that fall fourfold a bit."""
    unit_site, unit_expert, unit_projection = (
        a.reshape(-1) for a in np.indices((sites, experts, projections))
    )
    units = len(unit_site)
    sizes = np.tile([fmt.stored_bits(128, 128) for fmt in G128], (units, 1))
    weights = np.full(units, 128 * 128)
    return Problem(
        tuple(f"layers.{site}" for site in range(sites)),
        unit_site,
        unit_expert,
        unit_projection,
        G128,
        np.tile([4.0**-fmt.bits for fmt in G128], (units, 1)),
        sizes,
        weights,
        int(bits * weights.sum()),
    )


def widths(problem: Problem, choice: NDArray[np.int64]) -> list[int]:
    return [problem.formats[index].bits for index in choice.tolist()]


def test_block_importance_promotes_the_blocks_that_turn_most() -> None:
    problem = replace(blocks(2.9, sites=3, experts=2), similarity=np.array([0.9, 0.5, 0.7]))
    # 2.1875 bits for all leave 0.71 a weight: two of three blocks go to 3 bits, in order of 1 - similarity.
    assert widths(problem, block_importance(problem).choice) == [2, 2, 3, 3, 3, 3]


def test_outlier_score_promotes_linears() -> None:
    problem = replace(blocks(2.55, sites=1, experts=3), outliers=np.array([4.0, 9.0, 5.0]))
    assert widths(problem, outlier_score(problem).choice) == [2, 3, 2]


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        # entropies 1, 2, 6, 7 (mean 4): the last two get the largest of three formats
        (1.2, [1, 1, 1, 1]),
        (1.7, [1, 1, 2, 2]),
        (2.2, [1, 1, 3, 3]),
        (2.5, [1, 2, 3, 3]),
        (2.7, [2, 2, 3, 3]),
        (3.45, [2, 3, 4, 4]),
        (5.25, [4, 4, 6, 6]),
        (9.0, [8, 8, 8, 8]),
    ],
)
def test_ewq_by_hand(bits: float, expected: list[int]) -> None:
    problem = replace(blocks(bits, sites=4, experts=1), entropy=np.array([1.0, 6.0, 2.0, 7.0]))
    found = widths(problem, ewq(problem).choice)
    assert sorted(found) == expected
    assert found[1] == found[3] == max(found)
    assert found[0] <= found[2]


def all_plans(problem: Problem) -> list[tuple[int, ...]]:
    columns = range(len(problem.formats))
    rows = np.arange(len(problem.weights))
    plans = itertools.product(columns, repeat=len(problem.weights))
    return [p for p in plans if problem.sizes[rows, list(p)].sum() <= problem.available_bits]


@pytest.mark.parametrize("seed", range(4))
def test_mxmoe_with_times_minimises_the_product(seed: int) -> None:
    """One site of four units: brute force over all plans that fit."""
    random = np.random.default_rng(seed)
    problem = blocks(3.3, sites=1, experts=4)
    problem = replace(
        problem, formats=problem.formats[:4], costs=problem.costs[:, :4], sizes=problem.sizes[:, :4]
    )
    problem = replace(problem, costs=problem.costs * random.lognormal(0, 1.5, (4, 1)))
    by_error = mxmoe(problem).choice
    rows = np.arange(4)
    errors = np.sqrt(problem.costs)
    assert errors[rows, by_error].sum() == pytest.approx(
        min(errors[rows, list(plan)].sum() for plan in all_plans(problem))
    )
    times = random.uniform(0.5, 1, (4, 1)) * np.array([[1.0, 1.6, 2.2, 3.0]])
    timed = replace(problem, latency=times)

    def objective(plan: tuple[int, ...]) -> float:
        chosen = (rows, list(plan))
        return float(errors[chosen].sum() ** ERROR_EXPONENT * times[chosen].sum() ** (1 - ERROR_EXPONENT))

    found = objective(tuple(mxmoe(timed).choice.tolist()))
    best = min(objective(plan) for plan in all_plans(timed))
    assert found <= 1.02 * best  # it descends, as the paper's alternation would, and may stop beside the best
    assert found <= objective(tuple(by_error.tolist())) * (1 + 1e-12)


def test_mxmoe_gives_every_block_the_same_bits() -> None:
    problem = blocks(2.7, sites=2, experts=4)
    problem = replace(
        problem, formats=problem.formats[:4], costs=problem.costs[:, :4], sizes=problem.sizes[:, :4]
    )
    scaled = problem.costs * np.where(problem.unit_site == 0, 1000.0, 1.0)[:, None]
    found = mxmoe(replace(problem, costs=scaled)).choice
    assert sorted(widths(problem, found)[:4]) == sorted(widths(problem, found)[4:]) == [2, 2, 3, 3]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_gemq_equals_brute_force(data: st.DataObject) -> None:
    sites = np.array([0, 0, 1, 1, 1])
    row = st.lists(st.integers(0, 1000), min_size=3, max_size=3)
    costs = np.array(data.draw(st.lists(row, min_size=5, max_size=5)), dtype=np.float64)
    sizes = (
        np.array([[1, 2, 3]] * 5)
        * np.array(data.draw(st.lists(st.integers(1, 4), min_size=5, max_size=5)))[:, None]
    )
    plans = []
    for plan in itertools.product(range(3), repeat=5):
        chosen = np.array(plan)
        if all({1, 2} <= set(chosen[sites == site].tolist()) for site in (0, 1)):
            plans.append((int(sizes[np.arange(5), chosen].sum()), float(costs[np.arange(5), chosen].sum())))
    budget = data.draw(st.integers(min(plans)[0], 60))
    best = min(cost for size, cost in plans if size <= budget)
    found = solve(costs, sizes, sites, budget)
    assert int(sizes[np.arange(5), found].sum()) <= budget
    assert all({1, 2} <= set(found[sites == site].tolist()) for site in (0, 1))
    assert float(costs[np.arange(5), found].sum()) <= best + 1e-4 * max(costs.max(), 1.0)


def test_fuzzy_c_means_is_a_fixed_point_and_finds_separate_clusters() -> None:
    values = np.concatenate([c + np.linspace(-0.1, 0.1, 9) for c in (1.0, 3.0, 6.0, 10.0)])
    memberships = fuzzy_c_means(values)
    np.testing.assert_allclose(memberships.sum(axis=1), 1)
    assert (memberships.argmax(axis=1) == np.repeat(range(4), 9)).all()
    # The equations of the algorithm hold at what it returns.
    mass = memberships**2
    centers = values @ mass / mass.sum(axis=0)
    assert centers == pytest.approx([1, 3, 6, 10], abs=0.02)
    ratios = (
        np.abs(values[:, None, None] - centers[None, :, None]) / np.abs(values[:, None] - centers)[:, None]
    )
    np.testing.assert_allclose(memberships, 1 / (ratios**2).sum(axis=2), atol=1e-4)


def test_fuzzy_c_means_of_equal_values() -> None:
    np.testing.assert_allclose(fuzzy_c_means(np.ones(5)), 0.25)


def test_moqa_orders_bits_by_significance_and_prefers_low_precision() -> None:
    shares = np.array([1, 1.1, 0.9, 1, 3, 3.1, 6, 6.1, 12, 12.2])
    problem = replace(blocks(4.2, sites=1, experts=10), significance=(shares / shares.sum(),))
    found = moqa(problem)
    chosen = np.array(widths(problem, found.choice))
    assert set(chosen.tolist()) <= {2, 4, 6, 8}
    assert (np.diff(chosen[np.argsort(shares, kind="stable")]) >= 0).all()
    # The plain rule (the cluster that half of the membership reaches) would take more than the budget.
    above = membership_above(fuzzy_c_means(shares / shares.sum() * 10))
    plain = np.array([2, 4, 6, 8])[(above >= 0.5).sum(axis=1)]
    assert plain.tolist() == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert (chosen <= plain).all()
    assert (chosen < plain).any()
    # The next smaller threshold does not fit: it is the largest plan of its family.
    larger = [np.array([2, 4, 6, 8])[(above >= tau).sum(axis=1)] for tau in np.unique(above)]
    fitting = [int((plan + 0.1875).sum() * 128 * 128) for plan in larger]
    assert found.size == max(size for size in fitting if size <= problem.available_bits)


def test_moqa_below_two_bits_takes_the_small_widths() -> None:
    shares = np.array([1, 2, 4, 8.0])
    problem = replace(blocks(2.0, sites=1, experts=4), significance=(shares / shares.sum(),))
    assert set(widths(problem, moqa(problem).choice)) <= {1, 2, 3, 4}
