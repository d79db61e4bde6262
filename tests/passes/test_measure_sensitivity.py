"""measure-sensitivity: the encoding of what `calibrate.costs` measures."""

from typing import Any

import pytest
from tvm import IRModule

from moqc.calibrate import costs
from moqc.ir.annotations import SENSITIVITY
from moqc.passes.measure_sensitivity import MeasureSensitivity


def test_sensitivity_is_scaled_to_the_largest(moe: IRModule, calibrated: Any) -> None:
    found = SENSITIVITY.of(MeasureSensitivity()(moe, calibrated))
    expected = costs.measure_sensitivity(
        calibrated.checkpoint, calibrated.calibration, calibrated.workspace, tokens=2048
    )
    largest = max(expected.values())
    assert max(found.values()) == 10**9
    assert found == pytest.approx({site: value / largest * 1e9 for site, value in expected.items()}, abs=1)
