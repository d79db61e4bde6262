import pytest

from moqc.errors import PipelineError
from moqc.ir.annotations import BITS, LINEAR_BITS, PARAMS
from moqc.ir.sites import ExpertSite
from moqc.ir.verify import verify
from moqc.passes.base import PassContext
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.passes.synthesize_weights import SynthesizeWeights, parse_mix, random_plan
from moqc.quant.formats import Format


def test_module_is_packed_like_a_quantized_one(moe, checkpoint, tmp_path):
    from moqc.calibrate.workspace import ParamStore

    result = SynthesizeWeights(experts=("int4-g64",))(moe, PassContext())
    verify(result)
    assert BITS.of(result) == {"mlp.experts": dict.fromkeys(("gate", "up", "down"), ["int4-g64"] * 3)}
    quantized = QuantizeLinears()(moe, PassContext(checkpoint=checkpoint, params=ParamStore(tmp_path)))
    assert LINEAR_BITS.of(result) == LINEAR_BITS.of(quantized)
    names = PARAMS.of(result)
    assert [name for name in PARAMS.of(quantized) if "experts" not in name] == [
        name for name in names if "experts" not in name
    ]
    assert "mlp.experts.table" in names
    assert "mlp.experts.gate.0.codes" in names
    with pytest.raises(PipelineError, match=r"no R\.moqc\.experts left"):
        SynthesizeWeights()(result, PassContext())


def test_shares_are_kept_in_every_projection():
    site = ExpertSite("s", 64, 32, 16, "silu_glu", ("gate", "up", "down"))
    mix = parse_mix(["int2-g64:3", "int3-g64:4", "int4-g64:1"])
    assert mix == {Format(2): 0.375, Format(3): 0.5, Format(4): 0.125}
    plan = random_plan([site], mix, 0)["s"]
    for formats in plan.values():
        assert [formats.count(f"int{bits}-g64") for bits in (2, 3, 4)] == [24, 32, 8]
    assert plan["gate"] != plan["up"]
    assert random_plan([site], mix, 0)["s"] == plan
    assert random_plan([site], mix, 1)["s"] != plan


@pytest.mark.parametrize("entries", [["int2-g64:0"], ["int2-g64:-1"], ["int2-g64:inf"], ["int2-g64:x"], []])
def test_shares_that_are_none(entries):
    with pytest.raises(PipelineError, match=r"share|no format"):
        parse_mix(entries)
