from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from tvm import IRModule, relax

from moqc.errors import BudgetError, PipelineError, UserError
from moqc.ir.annotations import (
    BITS,
    BLOCK_ERRORS,
    COSTS,
    GRADIENTS,
    LINEAR_COSTS,
    PROFILE,
    SIMILARITY,
    WEIGHTS,
)
from moqc.ir.ops import experts
from moqc.ir.sites import find_experts
from moqc.ir.text import parse_module, print_module
from moqc.passes.allocate_bits import AllocateBits, expected_microseconds, tied_units
from moqc.passes.allocation_problem import FORMATS, NEEDS, OWN_FORMATS, TABLE_BITS, build_problem
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.quant.allocators.table import ALLOCATORS
from moqc.quant.formats import Format
from moqc.quant.problem import PROJECTIONS
from moqc.targets import Roofline, Target

EXPERTS, HIDDEN, INTERMEDIATE = 4, 256, 128
SITES = {"layers.0": ("gate", "up", "down"), "layers.1": ("up", "down")}


def module() -> IRModule:
    """Two experts blocks; the second has no gate."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((5, HIDDEN), "float32"))
    ids = relax.Var("ids", relax.TensorType((5, 2), "int64"))
    weights = relax.Var("weights", relax.TensorType((5, 2), "float32"))
    tensors: dict[str, list[relax.Var]] = {}
    for site, names in SITES.items():
        for name in names:
            shape = (HIDDEN, INTERMEDIATE) if name == "down" else (INTERMEDIATE, HIDDEN)
            info = relax.TensorType((EXPERTS, *shape), "float32")
            tensors.setdefault(site, []).append(relax.Var(f"{site}.{name}".replace(".", "_"), info))
    parameters = [x, ids, weights, *(var for group in tensors.values() for var in group)]
    with builder.function("main", parameters):
        with builder.dataflow():
            value = x
            for site, names in SITES.items():
                activation = "silu_glu" if "gate" in names else "relu2"
                call = experts(
                    value, ids, weights, *tensors[site], site=site, activation=activation, operands=names
                )
                value = builder.emit(call)
            output = builder.emit_output(value)
        builder.emit_func_output(output)
    return builder.get()


def costs(formats: tuple[str, ...] = FORMATS) -> dict[str, Any]:
    random = np.random.default_rng(0)
    return {
        site: {
            name: {
                fmt: (random.lognormal(0, 1.5, EXPERTS) * 4.0 ** -Format.parse(fmt).bits * 1e9)
                .astype(int)
                .tolist()
                for fmt in formats
            }
            for name in names
        }
        for site, names in SITES.items()
    }


def annotated(allocator: str = "global") -> IRModule:
    """All annotations, with costs of the formats that `allocator` takes."""
    measured = costs(OWN_FORMATS["mxmoe"] if allocator == "mxmoe" else FORMATS)
    profile = {
        site: {
            "tokens": 100,
            "pairs": [10, 120, 30, 40],
            "weight_ppm": [400_000, 600_000, 500_000, 500_000],
            "significance_ppm": {"prose": [1, 10, 3, 4], "code": [4, 9, 1, 1]},
        }
        for site in SITES
    }
    errors = {site: {"1": [9, 9, 9, 9], "2": [5, 5, 5, 5], "3": [1, 1, 1, 1]} for site in SITES}
    weights = {
        site: {"entropy": entropy, "outliers": {name: [3, 9, 4, 5] for name in names}}
        for entropy, (site, names) in enumerate(SITES.items())
    }
    mod = BLOCK_ERRORS.put(PROFILE.put(COSTS.put(module(), measured), profile), errors)
    mod = GRADIENTS.put(WEIGHTS.put(mod, weights), {"tokens": 100, "sites": errors})
    return SIMILARITY.put(mod, {site: 900_000 - at for at, site in enumerate(SITES)})


def file_bits(plan: dict[str, dict[str, list[str]]]) -> float:
    """Bits per weight as an artifact would store the plan."""
    stored = sum(EXPERTS * TABLE_BITS for _ in plan)
    count = 0
    for projections in plan.values():
        for name, formats in projections.items():
            shape = (HIDDEN, INTERMEDIATE) if name == "down" else (INTERMEDIATE, HIDDEN)
            stored += sum(Format.parse(fmt).stored_bits(*shape) for fmt in formats)
            count += len(formats) * HIDDEN * INTERMEDIATE
    return stored / count


def used(plan: dict[str, dict[str, list[str]]]) -> set[str]:
    """Names of the formats in a plan."""
    return {fmt for projections in plan.values() for names in projections.values() for fmt in names}


@pytest.mark.parametrize("allocator", list(NEEDS))
@pytest.mark.parametrize("bits", [2.3, 2.75])
def test_every_allocator_meets_the_budget(allocator: str, bits: float) -> None:
    mod = annotated(allocator)
    result = AllocateBits(bits=bits, allocator=allocator)(mod, PassContext())
    plan = BITS.of(result)
    assert {site: tuple(projections) for site, projections in plan.items()} == SITES
    assert all(len(names) == EXPERTS for projections in plan.values() for names in projections.values())
    coarse = {"uniform", "moqa", "ewq", "block-importance"}
    assert bits - (0.6 if allocator in coarse else 0.5) < file_bits(plan) <= bits
    assert BITS.get(mod) is None


def test_needs_name_every_allocator() -> None:
    assert list(NEEDS) == list(ALLOCATORS)


def test_global_costs_less_than_uniform() -> None:
    measured = costs()

    def cost(allocator: str) -> int:
        plan = BITS.of(AllocateBits(bits=2.5, allocator=allocator)(annotated(allocator), PassContext()))
        return sum(
            measured[site][name][fmt][expert]
            for site, projections in plan.items()
            for name, formats in projections.items()
            for expert, fmt in enumerate(formats)
        )

    assert cost("global") < cost("uniform")


def test_plan_follows_costs_and_profile() -> None:
    spiked = costs()
    for fmt in FORMATS:
        spiked["layers.1"]["up"][fmt][2] *= 10_000
    mod = COSTS.put(annotated(), spiked)
    plan = BITS.of(AllocateBits(bits=2.0, allocator="global")(mod, PassContext()))
    assert plan["layers.1"]["up"][2] == "int8-g64"
    by_use = BITS.of(AllocateBits(bits=2.5, allocator="frequency")(mod, PassContext()))
    widths = [Format.parse(fmt).bits for fmt in by_use["layers.0"]["gate"]]
    assert widths[1] == max(widths)
    assert widths[0] == min(widths)
    pmq = BITS.of(AllocateBits(bits=2.3, allocator="pmq")(mod, PassContext()))
    assert pmq["layers.0"]["down"][1] == "int3-g128"
    assert used(pmq) <= {"int1-g128", "int2-g128", "int3-g128"}


def test_plan_survives_printing() -> None:
    mod = AllocateBits(bits=2.5)(annotated(), PassContext())
    assert BITS.of(parse_module(print_module(mod))) == BITS.of(mod)


def test_allocators_require_what_they_read() -> None:
    bare = module()
    plan = BITS.of(AllocateBits(bits=2.5, allocator="uniform")(bare, PassContext()))
    assert {fmt for projections in plan.values() for names in projections.values() for fmt in names} == {
        "int2-g64"
    }
    for allocator, writer in (
        ("frequency", "profile-activation"),
        ("pmq", "profile"),
        ("global", "measure-costs"),
    ):
        with pytest.raises(PipelineError, match=writer):
            AllocateBits(allocator=allocator)(bare, PassContext())
    with pytest.raises(UserError, match="known are uniform"):
        AllocateBits(allocator="best")(bare, PassContext())


def test_formats_can_be_chosen() -> None:
    chosen = ("int1-g64", "int4-g64")
    plan = BITS.of(AllocateBits(bits=2.5, formats=chosen)(annotated(), PassContext()))
    assert used(plan) == set(chosen)
    with pytest.raises(PipelineError, match="no costs for int4-g32; measured are int1-g64, "):
        AllocateBits(formats=("int4-g32",))(annotated(), PassContext())
    with pytest.raises(UserError, match="unknown format 'int5'"):
        AllocateBits(allocator="uniform", formats=("int5",))(module(), PassContext())


@pytest.mark.parametrize("allocator", list(NEEDS))
def test_unreachable_bits_name_the_range(allocator: str) -> None:
    with pytest.raises(BudgetError, match=r"^1 bits per weight are out of reach: .* reach 1\.\d+ to"):
        AllocateBits(bits=1.0, allocator=allocator)(annotated(allocator), PassContext())


@pytest.mark.parametrize("allocator", list(NEEDS))
def test_bits_that_cannot_be_spent_name_the_range(allocator: str) -> None:
    with pytest.raises(BudgetError, match=r"reach 1\.\d+ to \d\.\d+; lower") as error:
        AllocateBits(bits=12.0, allocator=allocator)(annotated(allocator), PassContext())
    most = float(str(error.value).partition(" to ")[2].partition(";")[0])
    AllocateBits(bits=most, allocator=allocator)(annotated(allocator), PassContext())
    AllocateBits(bits=1.05 * most, allocator=allocator)(annotated(allocator), PassContext())
    with pytest.raises(BudgetError):
        AllocateBits(bits=1.2 * most, allocator=allocator)(annotated(allocator), PassContext())


@pytest.mark.parametrize("bits", [0.0, -1.0, 16.5, float("nan")])
def test_senseless_bits_are_refused(bits: float) -> None:
    with pytest.raises(BudgetError, match="above 0 and at most 16"):
        AllocateBits(bits=bits)(annotated(), PassContext())


def test_module_without_experts_is_refused() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 2), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(x)
    with pytest.raises(PipelineError, match=r"no R\.moqc\.experts"):
        AllocateBits(allocator="uniform")(builder.get(), PassContext())


def test_pipeline_text_and_log(caplog: pytest.LogCaptureFixture) -> None:
    text = "allocate-bits{bits=2.25 allocator=pmq formats=int1-g128+int2-g128+int3-g128}"
    pipeline = Pipeline.parse(text)
    assert str(pipeline) == text
    with caplog.at_level(logging.INFO, "moqc"):
        pipeline.passes[0](annotated(), PassContext())
    assert "pmq: 2." in caplog.text
    with pytest.raises(PipelineError, match=r"moqc\.profile"):
        pipeline.check()


def test_tied_projections_share_a_format() -> None:
    mod = annotated()
    plan = BITS.of(AllocateBits(bits=2.5, tie="gate-up")(mod, PassContext()))
    assert plan["layers.0"]["gate"] == plan["layers.0"]["up"]
    assert plan["layers.0"]["gate"] != plan["layers.0"]["down"]
    whole = BITS.of(AllocateBits(bits=2.5, tie="expert")(mod, PassContext()))
    for projections in whole.values():
        assert len({tuple(names) for names in projections.values()}) == 1
    assert file_bits(whole) <= 2.5
    assert file_bits(plan) <= 2.5


def test_merged_units_add_up() -> None:
    sites = find_experts(annotated())
    problem = build_problem(annotated(), sites, "global", (), 2.5)
    groups = tied_units(problem, "gate-up")
    assert groups[:4].tolist() == [0, 0, 1, 2]  # gate and up, down, then the next expert
    merged = problem.merged(groups)
    assert merged.costs[0].tolist() == (problem.costs[0] + problem.costs[1]).tolist()
    assert merged.sizes.sum() == problem.sizes.sum()
    assert merged.weights[:2].tolist() == [2 * HIDDEN * INTERMEDIATE, HIDDEN * INTERMEDIATE]
    assert merged.available_bits == problem.available_bits


@pytest.mark.parametrize("classes", [1, 2])
def test_classes_of_a_block_are_limited(classes: int) -> None:
    plan = BITS.of(AllocateBits(bits=2.5, classes=classes)(annotated(), PassContext()))
    for projections in plan.values():
        assert len({fmt for names in projections.values() for fmt in names}) <= classes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie": "all"}, "tie=all is not one of none, gate-up, expert"),
        ({"classes": -1}, "classes=-1 must not be negative"),
        ({"classes": 2, "allocator": "uniform"}, "allocator only"),
    ],
)
def test_bad_constraints(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PipelineError, match=message):
        AllocateBits(bits=2.5, **options)(annotated(), PassContext())


def test_time_is_bounded() -> None:
    target = Target("box", {"kind": "llvm"}, frozenset(), roofline=Roofline(1e9, 1e15, 0.0, "made up"))
    ctx, mod = PassContext(target=target), annotated()
    sites = find_experts(mod)
    problem = build_problem(mod, sites, "global", (), 3.0)
    times = expected_microseconds(mod, sites, problem, target)
    # 120 of 100 tokens' pairs go to expert 1 of the first site: 1.2 hits a token.
    assert times[3, 0] == pytest.approx(1.2 * problem.sizes[3, 0] / 8 / 1e9 * 1e6)

    def spent(plan: dict[str, dict[str, list[str]]]) -> float:
        names = [str(fmt) for fmt in problem.formats]
        total = 0.0
        for unit in range(len(problem.weights)):
            site = problem.sites[problem.unit_site[unit]]
            chosen = plan[site][PROJECTIONS[problem.unit_projection[unit]]][problem.unit_expert[unit]]
            total += times[unit, names.index(chosen)]
        return total

    free = spent(BITS.of(AllocateBits(bits=3.0)(mod, ctx)))
    bound = 0.9 * free
    assert spent(BITS.of(AllocateBits(bits=3.0, microseconds=bound)(mod, ctx))) <= bound
    with pytest.raises(BudgetError, match="us a token are out of reach"):
        AllocateBits(bits=3.0, microseconds=0.01 * free)(mod, ctx)
    with pytest.raises(PipelineError, match="allocate-bits needs a target"):
        AllocateBits(bits=3.0, microseconds=bound)(mod, PassContext())
    with pytest.raises(PipelineError, match="microseconds=-1 must not be negative"):
        AllocateBits(bits=3.0, microseconds=-1.0)(mod, ctx)
    with pytest.raises(PipelineError, match="give bits with them"):
        AllocateBits(model_bits=3.0, microseconds=bound)(LINEAR_COSTS.put(mod, {}), ctx)


def test_overrides_hold_what_they_name_to_their_bits():
    """Of several the last decides; the others share what is left."""
    texts = (r"layers\.0\..*=4", r"layers\.0\.2\.(gate|up)$=1,2")
    plan = BITS.of(AllocateBits(bits=3.5, overrides=texts).run(annotated(), PassContext()))
    found = {name: [Format.parse(fmt).bits for fmt in names] for name, names in plan["layers.0"].items()}
    assert found["down"] == [4, 4, 4, 4]
    for name in ("gate", "up"):
        assert found[name][2] in (1, 2)
        assert [found[name][expert] for expert in (0, 1, 3)] == [4, 4, 4]
    assert file_bits(plan) <= 3.5
    free = BITS.of(AllocateBits(bits=3.5).run(annotated(), PassContext()))
    assert plan["layers.1"] != free["layers.1"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"overrides": (r"layers\.7\.=4",)},
            r"override layers.*=4: its pattern is found in no name; .*layers\.0\.0",
        ),
        ({"overrides": ("down(=4",)}, "not a regular expression"),
        ({"overrides": ("down=5",)}, "no candidate has these bits; the formats have 1, 2, 3, 4, 8"),
        ({"overrides": ("down=4",), "allocator": "uniform"}, "overrides are options of the global"),
        ({"overrides": ("layers=8",), "bits": 4.0}, "bits"),
    ],
)
def test_overrides_that_cannot_be(options, says):
    with pytest.raises(UserError, match=says):
        AllocateBits(**{"bits": 3.0, **options})(annotated(), PassContext())
