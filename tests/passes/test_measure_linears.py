"""measure-linears, and the budget of the whole model that its costs make possible."""

from pathlib import Path
from typing import Any

import pytest
from tvm import IRModule

from moqc.calibrate.linears import measure_linears
from moqc.errors import BudgetError, PipelineError
from moqc.frontend.hf import import_model
from moqc.frontend.sizes import kept_bits, model_weights
from moqc.ir.annotations import BITS, COSTS, LINEAR_BITS, LINEAR_COSTS, LINEAR_PLAN
from moqc.passes.allocation_problem import TABLE_BITS
from moqc.passes.measure_linears import MeasureLinears
from moqc.passes.pipeline import Pipeline
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.quant.formats import Format

FORMATS = ("int2-g32", "int4-g32", "int8-g32-sym")
TEXT = (
    "profile-channels,measure-gradients,measure-costs{formats=int1-g32+int2-g32+int4-g32 curvature=token},"
    "measure-linears{formats=int2-g32+int4-g32+int8-g32-sym probe=int2-g32},allocate-bits{model_bits=%g}"
)


@pytest.fixture(scope="module")
def imported(calibrated: Any) -> IRModule:
    return import_model(calibrated.checkpoint)


def test_costs_are_in_nats(imported: IRModule, calibrated: Any) -> None:
    found = LINEAR_COSTS.of(MeasureLinears(formats=FORMATS, probe="int2-g32")(imported, calibrated))
    sites = sorted(QuantizeLinears().eligible(imported))
    assert sorted(found) == sites
    assert "lm_head" in found
    assert not any("mlp.gate" in site for site in found)  # routers stay as they are
    expected = measure_linears(
        calibrated.checkpoint,
        calibrated.calibration,
        calibrated.workspace,
        sites,
        [Format.parse(name) for name in FORMATS],
        probe=Format.parse("int2-g32"),
    )
    for site, by_format in expected.items():
        assert found[site] == pytest.approx({name: c * 1e15 for name, c in by_format.items()}, abs=1)


@pytest.mark.parametrize("bits", [4.5, 6.0])
def test_one_budget_for_the_whole_model(imported: IRModule, calibrated: Any, bits: float) -> None:
    mod = Pipeline.parse(TEXT % bits).run(imported, calibrated)
    checkpoint, plan, linears = calibrated.checkpoint, BITS.of(mod), LINEAR_PLAN.of(mod)
    stored = kept_bits(checkpoint, {f"{site}.weight" for site in linears})
    stored += sum(Format.parse(f).stored_bits(*checkpoint.shape(f"{s}.weight")) for s, f in linears.items())
    for site, projections in plan.items():
        stored += TABLE_BITS * len(projections["up"])
        for name, formats in projections.items():
            shape = checkpoint.shape(f"{site}.{name}")[1:]
            stored += sum(Format.parse(fmt).stored_bits(*shape) for fmt in formats)
    assert 0.97 * bits < stored / model_weights(checkpoint) <= bits
    assert {Format.parse(name) for name in linears.values()} <= {Format.parse(name) for name in FORMATS}
    # quantize-linears takes the plan, whatever its options say.
    assert QuantizeLinears(linears="none").plan(mod) == {s: Format.parse(f) for s, f in linears.items()}


def test_impossible_budgets_and_options(imported: IRModule, calibrated: Any) -> None:
    with pytest.raises(BudgetError, match="out of reach: these formats"):
        Pipeline.parse(TEXT % 1.0).run(imported, calibrated)
    with pytest.raises(BudgetError, match="model_bits=-1: must be above 0"):
        Pipeline.parse(TEXT % -1).run(imported, calibrated)
    with pytest.raises(PipelineError, match="allocator only"):
        Pipeline.parse("allocate-bits{model_bits=4.0 allocator=uniform}").run(
            LINEAR_COSTS.put(imported, {}), calibrated
        )
    with pytest.raises(PipelineError, match="put measure-linears before it"):
        Pipeline.parse("measure-gradients,allocate-bits{model_bits=4.0}").run(
            COSTS.put(imported, {}), calibrated
        )
    with pytest.raises(PipelineError, match="formats= is empty"):
        MeasureLinears(formats=())(imported, calibrated)


def test_plans_reach_the_packed_weights(imported: IRModule, calibrated: Any, tmp_path: Path) -> None:
    from dataclasses import replace

    from moqc.calibrate.workspace import ParamStore

    ctx = replace(calibrated, params=ParamStore(tmp_path / "params"))
    mod = Pipeline.parse(TEXT % 7.0 + ",quantize-linears").run(imported, ctx)
    assert LINEAR_BITS.of(mod) == LINEAR_PLAN.of(mod)
