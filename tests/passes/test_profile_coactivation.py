"""profile-coactivation: counts and correlations against plain loops, and the graph."""

from typing import Any

import pytest
import torch
from tvm import IRModule

from moqc.calibrate.capture import Batches, Recorder
from moqc.calibrate.coactivation import Coactivation, measure_coactivation
from moqc.calibrate.layers import LayeredModel
from moqc.ir.annotations import COACTIVATION
from moqc.passes.profile_coactivation import ProfileCoactivation, summary
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn

PROBE = Format.parse("int2-g32")


def test_against_a_plain_loop(moe: IRModule, calibrated: Any) -> None:
    found = measure_coactivation(
        calibrated.checkpoint, calibrated.calibration, calibrated.workspace, probe=PROBE, tokens=10**6
    )
    model = LayeredModel(calibrated.checkpoint)
    stream = model.start(Batches.of(calibrated.calibration).tokens)
    for index in range(model.layer_count):
        (site,) = model.sites(index)
        block = model.experts(site)
        recorder = Recorder({site: block})
        with model.layer(index) as layer:
            layer.run(stream, recorder)
        captured = recorder.take(site)
        rounded = block.substitute(
            **{name: quantize_rtn(block.matrices(name), PROBE).dequantize() for name in block.projections}
        )
        together, products = torch.zeros(8, 8, dtype=torch.int64), torch.zeros(8, 8).double()
        for token, chosen in enumerate(captured.ids.tolist()):
            x = captured.x[token : token + 1]
            errors = {
                expert: (rounded.output(expert, x) - block.output(expert, x))[0].double()
                * captured.weights[token, slot].double()
                for slot, expert in enumerate(chosen)
            }
            for one in chosen:
                for other in chosen:
                    together[one, other] += 1
                    products[one, other] += errors[one] @ errors[other]
        assert torch.equal(found[site].together, together)
        torch.testing.assert_close(found[site].products, products, rtol=1e-3, atol=1e-7)
        own = products.diagonal().sum()
        assert found[site].cross_share == pytest.approx(float((products.sum() - own) / own), rel=1e-3)
    annotation = COACTIVATION.of(ProfileCoactivation(probe="int2-g32", pairs=5)(moe, calibrated))
    for one in annotation.values():
        assert sorted(expert for group in one["communities"] for expert in group) == list(range(8))
        assert len(one["pairs"]) == 5
        assert len(one["centrality_ppm"]) == 8


def test_without_a_probe_there_is_the_graph_alone(moe: IRModule, calibrated: Any) -> None:
    full, graph = (
        COACTIVATION.of(ProfileCoactivation(probe=probe)(moe, calibrated)) for probe in ("int2-g32", "none")
    )
    for site, one in graph.items():
        assert one["communities"] == full[site]["communities"]
        assert one["centrality_ppm"] == full[site]["centrality_ppm"]
        assert [pair[:3] for pair in one["pairs"]] == [pair[:3] for pair in full[site]["pairs"]]
        assert one["cross_ppm"] == 0
        assert {pair[3] for pair in one["pairs"]} == {0}


def test_communities_and_correlation_of_two_separate_groups() -> None:
    together = torch.zeros(6, 6, dtype=torch.int64)
    for group in ((0, 2, 4), (1, 3, 5)):
        for one in group:
            for other in group:
                together[one, other] = 30 if one == other else 10
    products = torch.eye(6).double()
    products[0, 2] = products[2, 0] = 0.5
    found = summary(Coactivation(together, products), 4, 0)
    assert found["communities"] == [[0, 2, 4], [1, 3, 5]]
    assert found["cross_ppm"] == round(1 / 6 * 1e6)
    assert found["centrality_ppm"] == pytest.approx([166_667] * 6, abs=1)
    assert [0, 2, 10, 500_000] in found["pairs"]


def test_experts_that_never_fire_together() -> None:
    found = summary(Coactivation(torch.diag(torch.tensor([3, 4])), torch.zeros(2, 2).double()), 4, 0)
    assert found["communities"] == [[0], [1]]
    assert found["centrality_ppm"] == [0, 0]
    assert (found["pairs"], found["cross_ppm"]) == ([], 0)
