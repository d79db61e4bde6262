import pytest

from moqc.errors import UserError
from moqc.pipelines import Plan, allocation_pipeline, candidate_formats
from moqc.quant.formats import Format
from moqc.quant.layouts import LAYOUTS


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantizer", ["gptq", "rtn", "awq", "hqq", "mcmoe"])
@pytest.mark.parametrize("bits", [2.5, 6.0])
def test_candidates_can_be_stored_and_rounded_to(layout: str, quantizer: str, bits: float) -> None:
    formats = [Format.parse(name) for name in candidate_formats(bits, layout, quantizer)]
    for fmt in formats:
        LAYOUTS[layout].shapes(fmt, 64, 256)  # refuses a format that the layout's kernels cannot read
        assert not fmt.trellis or quantizer in ("gptq", "rtn")
        assert not fmt.symmetric or quantizer != "hqq"
    sizes = [fmt.stored_bits(4096, 4096) / 4096**2 for fmt in formats]
    assert min(sizes) < 1.2
    assert (max(sizes) > 8) == (bits > 4)


def test_costs_are_measured_for_the_candidates_of_the_layout() -> None:
    assert "tcq2-g128" in str(allocation_pipeline(Plan("global"), 2.5))
    assert "tcq2-g128" not in str(allocation_pipeline(Plan("global"), 2.5, layout="mma16x256"))
    assert "tcq" not in str(allocation_pipeline(Plan("global", "hqq"), 2.5))


def test_unknown_quantizer() -> None:
    with pytest.raises(UserError, match="unknown quantizer 'spqr': known are rtn, hqq, awq, gptq, mcmoe"):
        Plan.parse("uniform:spqr")
