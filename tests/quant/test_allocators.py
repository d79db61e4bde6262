from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moqc.errors import BudgetError, InternalError, UserError
from moqc.quant.allocators.frequency import frequency
from moqc.quant.allocators.global_ import global_
from moqc.quant.allocators.pmq import allocate_site, pmq
from moqc.quant.allocators.table import ALLOCATORS, find_allocator
from moqc.quant.allocators.uniform import uniform
from moqc.quant.formats import Format
from moqc.quant.problem import Problem

MCMOE = ("int1-g128", "int2-g128", "int3-g128")
SIX = ("int1-g64", "int2-g128", "int2-g64", "int3-g128", "int3-g64", "int4-g64")


def model(
    bits: float,
    formats: tuple[str, ...] = MCMOE,
    *,
    sites: int = 2,
    experts: int = 4,
    hidden: int = 256,
    intermediate: int = 128,
    seed: int = 0,
) -> Problem:
    """A problem shaped like a real model: costs fall about fourfold a bit, importance varies by expert."""
    random = np.random.default_rng(seed)
    unit_site, unit_expert, unit_projection = (a.reshape(-1) for a in np.indices((sites, experts, 3)))
    parsed = tuple(Format.parse(name) for name in formats)
    shapes = [(intermediate, hidden) if p < 2 else (hidden, intermediate) for p in unit_projection]
    sizes = np.array([[f.stored_bits(*shape) for f in parsed] for shape in shapes])
    weights = np.full(len(shapes), hidden * intermediate)
    importance = np.exp(1.5 * random.standard_normal(len(shapes)))
    noise = np.exp(0.1 * random.standard_normal(sizes.shape))
    costs = importance[:, None] * np.array([4.0**-f.bits * (1 + f.group / 1000) for f in parsed]) * noise
    shares = random.dirichlet(np.ones(experts), sites)
    masses = random.dirichlet(np.ones(experts), sites)
    errors = np.exp(random.standard_normal((sites, experts, 1))) * np.array([1.0, 0.7, 0.3])
    return Problem(
        tuple(f"layers.{site}" for site in range(sites)),
        unit_site,
        unit_expert,
        unit_projection,
        parsed,
        costs,
        sizes,
        weights,
        int(bits * weights.sum()),
        frequency=tuple(shares),
        router_weight=tuple(masses),
        block_errors=tuple(errors),
        gradient_errors=tuple(errors**2 * random.lognormal(0, 1, (sites, 1, 1))),
        significance=tuple(random.dirichlet(np.full(experts, 0.5), sites)),
        entropy=random.normal(10, 1, sites),
        similarity=random.uniform(0.5, 1, sites),
        outliers=random.lognormal(0, 1, len(shapes)),
    )


def formats_for(name: str) -> tuple[str, ...]:
    """Formats that the allocator called `name` works with."""
    return (*MCMOE, "int4-g128", "int6-g128", "int8-g128") if name == "moqa" else MCMOE


def tiny(costs: list[list[float]], sizes: list[list[int]], budget: int) -> Problem:
    """Any costs and sizes: units of one site, an expert each."""
    units = len(costs)
    return Problem(
        ("site",),
        np.zeros(units, np.int64),
        np.arange(units),
        np.zeros(units, np.int64),
        tuple(Format(bits) for bits in (1, 2, 3, 4)[: len(costs[0])]),
        np.array(costs, dtype=np.float64),
        np.array(sizes, dtype=np.int64),
        np.full(units, 10),
        budget,
    )


def brute_force(problem: Problem) -> float | None:
    """The least cost of any plan that fits, None when none does."""
    best = None
    for choice in itertools.product(range(len(problem.formats)), repeat=len(problem.weights)):
        rows = (np.arange(len(choice)), list(choice))
        if problem.sizes[rows].sum() <= problem.available_bits:
            cost = float(problem.costs[rows].sum())
            best = cost if best is None else min(best, cost)
    return best


@st.composite
def tiny_problems(draw: st.DrawFn) -> Problem:
    units, formats = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    cost = st.one_of(st.floats(0, 1000, allow_subnormal=False), st.integers(0, 3).map(float))
    row = {"min_size": formats, "max_size": formats}
    costs = draw(st.lists(st.lists(cost, **row), min_size=units, max_size=units))
    sizes = draw(st.lists(st.lists(st.integers(1, 40), **row), min_size=units, max_size=units))
    return tiny(costs, sizes, draw(st.integers(1, 40 * units)))


@settings(max_examples=150, deadline=None)
@given(tiny_problems())
def test_global_equals_brute_force(problem: Problem) -> None:
    best = brute_force(problem)
    if best is None:
        with pytest.raises(BudgetError):
            global_(problem)
        return
    found = global_(problem)
    assert found.size <= problem.available_bits
    assert found.cost <= best * (1 + 1e-5) + 1e-9
    assert found.gap is not None
    assert found.gap <= 2e-5


@settings(max_examples=150, deadline=None)
@given(tiny_problems())
def test_the_gap_of_the_greedy_plan_is_a_bound(problem: Problem) -> None:
    best = brute_force(problem)
    if best is None:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moqc.quant.allocators.global_.EXACT_VARIABLES", 0)
        found = global_(problem)
    assert found.gap is not None
    assert found.size <= problem.available_bits
    if best > 0:
        assert (found.cost - best) / best <= found.gap + 1e-9


@settings(max_examples=60, deadline=None)
@given(tiny_problems(), st.integers(1, 20))
def test_more_budget_never_costs_more(problem: Problem, extra: int) -> None:
    costs, sizes = problem.costs.tolist(), problem.sizes.tolist()
    smallest = int(problem.sizes.min(axis=1).sum())
    budgets = [smallest + step * extra for step in range(6)]
    found = [global_(tiny(costs, sizes, budget)).cost for budget in budgets]
    for less, more in itertools.pairwise(found):
        assert more <= less * (1 + 2e-5) + 1e-9


def test_global_leaves_the_hull_when_that_pays() -> None:
    """The middle format is above the hull of its unit, yet all the budget allows."""
    problem = tiny([[10.0, 9.0, 1.0], [10.0, 9.5, 1.0]], [[1, 3, 5], [1, 3, 5]], 8)
    found = global_(problem)
    assert found.choice.tolist() == [1, 2]
    assert found.size == 8
    assert found.gap == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("bits", [1.6, 2.5, 3.3])
def test_global_solves_qwen3_30b_in_seconds(bits: float) -> None:
    problem = model(bits, SIX, sites=48, experts=128, hidden=2048, intermediate=768)
    assert problem.costs.shape == (18432, 6)
    start = time.perf_counter()
    found = global_(problem)
    assert time.perf_counter() - start < 20
    assert found.gap is not None
    assert found.gap <= 1e-4
    assert 0.999 * problem.available_bits <= found.size <= problem.available_bits


@pytest.mark.parametrize("bits", [1.7, 2.5, 3.0])
def test_global_beats_the_others_at_equal_bits(bits: float) -> None:
    problem = model(bits, MCMOE, experts=8)
    costs = {name: allocate(problem).cost for name, allocate in ALLOCATORS.items() if name != "moqa"}
    assert min(costs, key=lambda name: costs[name]) == "global"
    assert costs["global"] < costs["uniform"]


def test_equal_costs_take_the_smallest_format() -> None:
    found = global_(tiny([[0.0, 0.0]] * 3, [[4, 8]] * 3, 100))
    assert found.choice.tolist() == [0, 0, 0]
    assert found.gap == 0.0


def test_uniform_takes_the_largest_that_fits() -> None:
    unmeasured = tiny([[0.0, 0.0, 0.0]] * 2, [[10, 20, 30]] * 2, 59)
    assert uniform(unmeasured).choice.tolist() == [1, 1]
    measured = tiny([[5.0, 9.0, 1.0]] * 2, [[10, 20, 30]] * 2, 59)
    assert uniform(measured).choice.tolist() == [0, 0]


@pytest.mark.parametrize("name", list(ALLOCATORS))
def test_unreachable_budgets_name_the_range(name: str) -> None:
    with pytest.raises(BudgetError, match=r"^0\.9 bits per weight .* reach 1\.\d+ to [34]\.1\d+; raise"):
        ALLOCATORS[name](model(0.9, formats_for(name), experts=64))


@pytest.mark.parametrize("name", list(ALLOCATORS))
def test_overhead_is_part_of_the_budget(name: str) -> None:
    plain = model(2.4, formats_for(name), experts=8, sites=4)
    fields = {field: getattr(plain, field) for field in Problem.__dataclass_fields__}
    taxed = Problem(**fields | {"overhead_bits": plain.budget_bits // 4})
    found = ALLOCATORS[name](taxed)
    assert found.size + taxed.overhead_bits <= taxed.budget_bits
    assert found.size < ALLOCATORS[name](plain).size
    assert taxed.bits_per_weight(found.size) <= 2.4


@pytest.mark.parametrize("bits", [1.4, 1.7, 2.2, 2.5, 3.0, 3.19])
def test_frequency_gives_hot_experts_more(bits: float) -> None:
    problem = model(bits, SIX, sites=3, experts=8)
    found = frequency(problem)
    assert problem.frequency is not None
    assert len(set(found.choice.tolist())) <= 2
    assert found.size <= problem.available_bits
    hot_experts = []
    for site, share in enumerate(problem.frequency):
        units = problem.unit_site == site
        chosen = found.choice[units].reshape(8, 3)
        assert (chosen == chosen[:, :1]).all()
        larger = chosen[:, 0] == found.choice.max()
        hot_experts.append(int(larger.sum()))
        if larger.any() and not larger.all():
            assert share[larger].min() >= share[~larger].max()
    assert max(hot_experts) - min(hot_experts) <= 1
    one_expert = int(problem.sizes[:3].max(axis=1).sum())
    assert problem.available_bits - found.size < one_expert


def test_frequency_skips_formats_that_are_larger_and_worse() -> None:
    problem = tiny([[5.0, 9.0, 1.0]] * 2, [[10, 20, 30]] * 2, 45)
    fields = {field: getattr(problem, field) for field in Problem.__dataclass_fields__}
    found = frequency(Problem(**fields | {"frequency": (np.array([0.2, 0.8]),)}))
    assert found.choice.tolist() == [0, 2]


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 5))
def test_pmq_site_equals_brute_force(data: st.DataObject, experts: int) -> None:
    row = st.lists(st.floats(0, 1e4, allow_subnormal=False), min_size=3, max_size=3)
    coefficients = np.array(data.draw(st.lists(row, min_size=experts, max_size=experts)))
    budget = data.draw(st.integers(experts + 3, 3 * experts))
    bits = allocate_site(coefficients, budget)

    def cost(plan: tuple[int, ...]) -> float:
        return float(sum(coefficients[i, b - 1] for i, b in enumerate(plan)))

    plans = itertools.product((1, 2, 3), repeat=experts)
    allowed = [plan for plan in plans if sum(plan) <= budget and 2 in plan and 3 in plan]
    assert tuple(bits.tolist()) in allowed
    assert cost(tuple(bits.tolist())) <= min(map(cost, allowed)) + 1e-6 * coefficients.max()


def test_pmq_is_the_largest_plan_of_its_family() -> None:
    problem = model(2.5, MCMOE, sites=3, experts=8)
    found = pmq(problem)
    for site in range(3):
        chosen = found.choice[problem.unit_site == site].reshape(8, 3)
        assert (chosen == chosen[:, :1]).all()
        assert {1, 2} <= set(chosen[:, 0].tolist())
        assert int((chosen[:, 0] + 1).sum()) == 18  # 2.3125 code bits x 8 experts, rounded down
    one_bit_more = 3 * int((problem.sizes[:3, 1] - problem.sizes[:3, 0]).sum())
    assert found.size + one_bit_more > problem.available_bits


def test_pmq_spends_everything_it_can_use() -> None:
    assert pmq(model(9.0, experts=4)).choice.reshape(2, 4, 3)[:, :, 0].sum(axis=1).tolist() == [7, 7]


def test_pmq_protects_a_super_expert() -> None:
    problem = model(1.7, experts=8, sites=1)
    assert problem.block_errors is not None
    assert problem.frequency is not None
    assert problem.router_weight is not None
    problem.frequency[0][:] = problem.router_weight[0][:] = 1 / 8
    problem.block_errors[0][:] = np.array([1.0, 0.7, 0.3])
    problem.block_errors[0][5] *= 600
    assert set(pmq(problem).choice.reshape(8, 3)[5].tolist()) == {2}


def test_pmq_weighs_by_frequency_and_routing() -> None:
    """With equal errors the order of phi * w ** 1.5 decides who gets 3 bits."""
    problem = model(1.9, experts=6, sites=1)
    assert problem.block_errors is not None
    assert problem.frequency is not None
    assert problem.router_weight is not None
    problem.block_errors[0][:] = np.array([1.0, 0.7, 0.3])
    chosen = pmq(problem).choice.reshape(6, 3)[:, 0]
    weight = problem.frequency[0] * problem.router_weight[0] ** 1.5
    assert (np.diff(chosen[np.argsort(weight)]) >= 0).all()


def test_allocators_say_what_they_need() -> None:
    problem = tiny([[1.0, 0.5]], [[1, 2]], 3)
    for name in ALLOCATORS.keys() - {"uniform", "global", "mxmoe"}:
        with pytest.raises(ValueError, match="needs"):
            ALLOCATORS[name](problem)
    fields = {field: getattr(model(2.5), field) for field in Problem.__dataclass_fields__}
    with pytest.raises(ValueError, match="int1-g128"):
        pmq(Problem(**fields | {"formats": (Format(1), Format(2, 128), Format(3, 128))}))
    with pytest.raises(UserError, match=r"known are uniform, frequency, .*, global"):
        find_allocator("magic")
    assert find_allocator("global") is global_


def test_problems_are_checked() -> None:
    fields = {field: getattr(model(2.5), field) for field in Problem.__dataclass_fields__}
    for change, message in (
        ({"formats": (Format(1),)}, "are not"),
        ({"weights": np.ones(3, np.int64)}, "entries each"),
        ({"costs": fields["costs"] * np.nan}, "finite"),
        ({"sizes": fields["sizes"] * 0}, "positive"),
        ({"formats": ()}, "a unit and a format"),
    ):
        with pytest.raises(ValueError, match=message):
            Problem(**fields | change)
    problem = model(1.5)
    with pytest.raises(InternalError, match="exceeds"):
        problem.solution(np.full(len(problem.weights), 2))
