"""measure-sensitivity: the encoding of what `calibrate.costs` measures."""

from typing import Any

import pytest
from tvm import IRModule

from moqc.calibrate import costs
from moqc.ir.annotations import SENSITIVITY
from moqc.passes.measure_sensitivity import MeasureSensitivity


def test_sensitivity_is_in_trillionths_of_a_nat(moe: IRModule, calibrated: Any) -> None:
    found = SENSITIVITY.of(MeasureSensitivity()(moe, calibrated))
    expected = costs.measure_sensitivity(
        calibrated.checkpoint, calibrated.calibration, calibrated.workspace, tokens=2048
    )
    assert found == pytest.approx({site: value * 1e12 for site, value in expected.items()}, abs=1)


def test_no_block_is_free(moe: IRModule, calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    monkeypatch.setattr(
        "moqc.passes.measure_sensitivity.measure_sensitivity",
        lambda *arguments, **options: dict(zip(sites, (0.5, 0.0), strict=True)),
    )
    found = SENSITIVITY.of(MeasureSensitivity()(moe, calibrated))
    assert found == dict(zip(sites, (5 * 10**11, 5 * 10**8), strict=True))
