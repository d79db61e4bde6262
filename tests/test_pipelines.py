import re
from pathlib import Path

import pytest

from moqc.cli import COMMANDS
from moqc.errors import UserError
from moqc.options import TuneOptions
from moqc.passes.measure_costs import FORMATS
from moqc.passes.pipeline import Pipeline
from moqc.pipelines import Plan, allocation_pipeline, candidate_formats, default_pipeline
from moqc.quant.formats import Format
from moqc.quant.layouts import LAYOUTS, Layout
from moqc.quant.overrides import Override
from moqc.recipe import Recipe


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("quantizer", ["gptq", "rtn", "awq", "hqq", "mcmoe"])
@pytest.mark.parametrize("bits", [2.5, 6.0])
def test_candidates_can_be_stored_and_rounded_to(layout: Layout, quantizer: str, bits: float) -> None:
    formats = [Format.parse(name) for name in candidate_formats(bits, quantizer)]
    if quantizer in ("gptq", "rtn"):
        formats += [Format.parse(name) for name in candidate_formats(bits, quantizer, "trellis")]
    for fmt in formats:
        layout.shapes(fmt, 64, 256)  # refuses a format that the layout's kernels cannot read
        assert not fmt.trellis or quantizer in ("gptq", "rtn")
        assert not fmt.symmetric or quantizer != "hqq"
    sizes = [fmt.stored_bits(4096, 4096) / 4096**2 for fmt in formats]
    assert min(sizes) < 1.2
    assert (max(sizes) > 8) == (bits > 4)


def test_costs_are_measured_for_the_candidates() -> None:
    assert "tcq2-g128" in str(allocation_pipeline(Plan("global"), 2.5, formats="trellis"))
    assert "tcq" not in str(allocation_pipeline(Plan("global"), 2.5))
    chosen = "formats=int4-g64+int2-g32 "
    assert chosen in str(allocation_pipeline(Plan("global"), 3.0, formats="int4-g64, int2-g32"))
    assert "prior=0.75" in str(allocation_pipeline(Plan("global"), 3.0, prior=0.75))
    # A plan that names its own is not asked twice.
    assert chosen in str(allocation_pipeline(Plan.parse("global:gptq:int4-g64+int2-g32"), 3.0))
    # MxMoE's are those of its paper.
    own = "formats=int1-g128+int2-g128+int3-g128+int4-g128 "
    assert own in str(allocation_pipeline(Plan("mxmoe"), 3.0, formats="int4-g64, int2-g32"))


def test_tuning_is_for_the_candidates() -> None:
    *single, mixed = TuneOptions().bits
    assert set(single) == set(FORMATS)
    assert set(mixed.split("/")) <= set(FORMATS)


def test_plans_are_spelled_with_colons() -> None:
    assert Plan.parse("global") == Plan("global", "gptq", None)
    assert Plan.parse("uniform:rtn") == Plan("uniform", "rtn", None)
    assert Plan.parse("global:gptq:trellis") == Plan("global", "gptq", "trellis")
    assert Plan.parse("global::int2-g64+int4-g64") == Plan("global", "gptq", "int2-g64,int4-g64")


@pytest.mark.parametrize(
    ("plan", "kernels", "rotates"),
    [
        ("global", True, True),
        ("global", False, False),
        ("global:rtn", True, False),
        ("pmq:mcmoe", True, False),
    ],
)
def test_inputs_of_down_are_rotated_where_quantizer_and_kernels_do(plan, kernels, rotates) -> None:
    passes = allocation_pipeline(Plan.parse(plan), 2.5, rotate=kernels)
    assert ("rotate=true" in str(passes)) == rotates
    if plan != "pmq:mcmoe":
        allocator, _, quantizer = plan.partition(":")
        recipe = Recipe(allocator=allocator, quantizer=quantizer or "gptq", bits=2.5, linears="none")
        whole = default_pipeline(recipe, activations="int8", context=64, rotate=kernels)
        assert str(whole).count("rotate=true") == 2 * rotates


@pytest.mark.parametrize(
    ("quantizer", "formats", "says"),
    [
        ("hqq", "tcq2-g128", "one of the quantizers gptq, rtn"),
        ("gptq", "int5-g64", "int5-g64"),
    ],
)
def test_candidates_without_a_quantizer(quantizer, formats, says) -> None:
    with pytest.raises(UserError, match=says):
        candidate_formats(2.5, quantizer, formats)


def test_unknown_quantizer() -> None:
    with pytest.raises(UserError, match="unknown quantizer 'spqr': known are rtn, hqq, awq, gptq, mcmoe"):
        Plan.parse("uniform:spqr")


def test_overrides_bring_their_candidate() -> None:
    recipe = Recipe(overrides=(Override("down", (4, 8)),))
    text = str(default_pipeline(recipe, activations="int8", context=64))
    assert "int8-g128" in text
    assert 'overrides="down=4,8"' in text
    assert str(Pipeline.parse(text)) == text
    assert "int8-g128" not in str(default_pipeline(Recipe(), activations="int8", context=64))


def test_docs_name_the_dump_of_the_default_pipeline_by_its_number() -> None:
    names = [item.name for item in default_pipeline(Recipe(), activations="int8", context=64).passes]
    dump = f"{names.index('allocate-bits'):03d}_allocate-bits.py"
    page = (Path(__file__).parents[1] / "docs" / "passes.md").read_text()
    for text in (page, COMMANDS["opt"][1]):
        assert set(re.findall(r"\d{3}_allocate-bits\.py", text)) == {dump}


def test_the_report_alone_costs_no_calibration() -> None:
    plain = Recipe(allocator="uniform", quantizer="rtn")
    for recipe, measured in ((Recipe(), True), (plain, False)):
        text = str(default_pipeline(recipe, activations="int8", context=64))
        assert ("profile-coactivation" in text) == measured
