"""measure-costs: encoding, and what it reads."""

import statistics
from typing import Any

import numpy as np
import pytest
import torch
from tvm import IRModule

from moqc.calibrate import costs
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.statistics import PRIOR_PAIRS, collect_statistics
from moqc.errors import PipelineError
from moqc.ir.annotations import COSTS, SENSITIVITY
from moqc.passes.measure_costs import MeasureCosts
from moqc.passes.measure_gradients import MeasureGradients, run_backward
from moqc.passes.pipeline import Pipeline
from moqc.passes.profile_channels import ProfileChannels
from moqc.passes.scaling import to_integers
from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq

FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
FORMATS = ("int1-g32", "int3-g32")


def measured(calibrated: Any) -> dict[str, costs.SiteCosts]:
    """site -> projection -> format -> costs."""
    collected = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    formats = [Format.parse(name) for name in FORMATS]
    return costs.measure_costs(calibrated.checkpoint, collected, formats)


@pytest.mark.parametrize(("robustness", "prior"), [(0.0, 0.0), (2.0, 0.0), (0.5, 0.3)])
def test_costs_are_scaled_to_the_largest(
    moe: IRModule, calibrated: Any, robustness: float, prior: float
) -> None:
    mod = ProfileChannels()(moe, calibrated)
    found = COSTS.of(MeasureCosts(formats=FORMATS, robustness=robustness, prior=prior)(mod, calibrated))
    expected = {
        site: {
            projection: {
                name: [
                    (1 - prior) * (statistics.fmean(c) + robustness * statistics.pstdev(c)) + prior * even
                    for *c, even in zip(*rows["datasets"], rows["even"], strict=True)
                ]
                for name, rows in by_format.items()
            }
            for projection, by_format in projections.items()
        }
        for site, projections in measured(calibrated).items()
    }
    largest = max(max(expected[s][p][f]) for s in expected for p in expected[s] for f in FORMATS)
    assert max(max(found[s][p][f]) for s in found for p in found[s] for f in FORMATS) == 10**12
    for site in (FIRST, SECOND):
        assert list(found[site]) == ["gate", "up", "down"]
        for projection in found[site]:
            for name in FORMATS:
                values = [value / largest * 1e12 for value in expected[site][projection][name]]
                assert found[site][projection][name] == pytest.approx(values, abs=1)


def test_sensitivity_turns_costs_into_nats(moe: IRModule, calibrated: Any) -> None:
    """1e-12 nats a squared error in the one annotation, 1e-15 nats in the other."""
    mod = SENSITIVITY.put(ProfileChannels()(moe, calibrated), {FIRST: 5 * 10**9, SECOND: 2 * 10**10})
    found = COSTS.of(MeasureCosts(formats=FORMATS)(mod, calibrated))
    expected = measured(calibrated)
    for site, nats in ((FIRST, 0.005), (SECOND, 0.02)):
        error = statistics.fmean(rows[4] for rows in expected[site]["up"]["int1-g32"]["datasets"])
        assert found[site]["up"]["int1-g32"][4] == pytest.approx(error * nats * 1e15, rel=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantizer": "mcmoe"}, "quantizer=mcmoe is not one of rtn, hqq, awq, gptq"),
        ({"formats": ()}, "formats= is empty"),
        ({"curvature": "layer"}, "curvature=layer is not one of block, expert, token"),
        ({"robustness": -1.0}, "robustness=-1 must not be negative"),
        ({"prior": 1.5}, "prior=1.5 must be from 0 to 1"),
    ],
)
def test_bad_options(moe: IRModule, calibrated: Any, options: dict[str, Any], message: str) -> None:
    mod = ProfileChannels()(moe, calibrated)
    with pytest.raises(PipelineError, match=message):
        MeasureCosts(**options)(mod, calibrated)


def test_curvature_by_token_weighs_components_with_squared_gradients(moe: IRModule, calibrated: Any) -> None:
    """The costs are then GEMQ's sums for one projection, and ignore the sensitivity of blocks."""
    options: dict[str, Any] = {"formats": FORMATS, "curvature": "token"}
    mod = SENSITIVITY.put(ProfileChannels()(moe, calibrated), {FIRST: 500, SECOND: 2000})
    with pytest.raises(PipelineError, match="run measure-gradients before"):
        MeasureCosts(**options)(mod, calibrated)
    mod = MeasureGradients()(mod, calibrated)
    found = COSTS.of(MeasureCosts(**options)(mod, calibrated))
    gradients = run_backward(calibrated, "test", 8192)
    sample = gradients.sample(SECOND)
    model = LayeredModel(calibrated.checkpoint)
    collected = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    block, hessians = model.experts(SECOND), collected.of(SECOND).hessians("down").matrices
    expected = []
    for name in FORMATS:
        quantized = quantize_gptq(block.down, hessians, Format.parse(name))[0].dequantize()
        change = block.substitute(down=quantized).output(2, sample.x[2]) - block.output(2, sample.x[2])
        change = change * sample.weights[2].unsqueeze(1)
        expected.append(
            sample.totals((change.square() * sample.curvature[2]).sum(1).expand(8, -1)).mean(0)[2]
        )
    for name, value in zip(FORMATS, expected, strict=True):
        # Half the squared gradient: the diagonal of the Fisher information, in 1e-15 nats.
        assert found[SECOND]["down"][name][2] == pytest.approx(float(value) * 0.5e15, rel=1e-3)


def test_curvature_by_expert_is_the_mean_squared_gradient_in_its_output(
    moe: IRModule, calibrated: Any
) -> None:
    """Errors and frequencies are those of all calibration text, the gradients of fewer tokens."""
    mod = MeasureGradients(tokens=48)(ProfileChannels()(moe, calibrated), calibrated)
    found = COSTS.of(MeasureCosts(formats=FORMATS, curvature="expert")(mod, calibrated))
    gradients = run_backward(calibrated, "test", 48).sample(SECOND)
    collected = collect_statistics(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    assert gradients.tokens < collected.of(SECOND).tokens
    plain = measured(calibrated)
    of_expert = [gradients.curvature[e][gradients.weights[e] != 0].mean(1) for e in range(8)]
    overall = torch.cat(of_expert).mean()
    for name in FORMATS:
        error = np.mean(plain[SECOND]["down"][name]["datasets"], axis=0)
        for expert in range(8):
            own = of_expert[expert]
            mean = float((own.sum() + PRIOR_PAIRS * overall) / (len(own) + PRIOR_PAIRS))
            assert found[SECOND]["down"][name][expert] == pytest.approx(
                error[expert] * mean * 0.5e15, rel=1e-3
            )


def test_costs_need_the_channels_first(moe: IRModule, calibrated: Any) -> None:
    with pytest.raises(PipelineError, match="run profile-channels before"):
        MeasureCosts()(moe, calibrated)


def test_passes_are_registered_under_their_names() -> None:
    text = "profile-activation,profile-channels,measure-sensitivity,measure-costs,measure-block-errors"
    assert str(Pipeline.parse(text)) == text


def test_integers_keep_small_costs_apart_from_none() -> None:
    assert to_integers([0.0, 1e-9, 0.4, 1.5, -1e-9], 1.0) == [0, 1, 1, 2, -1]
