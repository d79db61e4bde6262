"""measure-gradients: encoding."""

from typing import Any

import pytest
from tvm import IRModule

from moqc.ir.annotations import GRADIENTS
from moqc.passes.measure_gradients import MeasureGradients, run_backward


def test_errors_are_scaled_to_the_largest_of_the_module(moe: IRModule, calibrated: Any) -> None:
    found = GRADIENTS.of(MeasureGradients(tokens=96)(moe, calibrated))
    assert found["tokens"] == 96
    measured = run_backward(calibrated, "test", 96)
    largest = max(max(max(row) for row in measured.errors(site)) for site in measured.keys)
    for site, by_bits in found["sites"].items():
        for expert, row in enumerate(measured.errors(site)):
            values = [by_bits[str(bits)][expert] for bits in (1, 2, 3)]
            assert values == pytest.approx([value / largest * 1e12 for value in row], abs=1)
    assert max(max(max(v) for v in by_bits.values()) for by_bits in found["sites"].values()) == 10**12
