"""measure-block-errors: the encoding of what `calibrate.costs` measures."""

from typing import Any

import pytest
from tvm import IRModule

from moqc.calibrate import costs
from moqc.ir.annotations import BLOCK_ERRORS
from moqc.passes.measure_block_errors import MeasureBlockErrors


def test_block_errors_are_scaled_by_site(moe: IRModule, calibrated: Any) -> None:
    found = BLOCK_ERRORS.of(MeasureBlockErrors()(moe, calibrated))
    expected = costs.measure_block_errors(calibrated.checkpoint, calibrated.calibration, calibrated.workspace)
    for site, by_expert in expected.items():
        largest = max(map(max, by_expert))
        assert list(found[site]) == ["1", "2", "3"]
        for column, bits in enumerate(("1", "2", "3")):
            values = [errors[column] / largest * 1e9 for errors in by_expert]
            assert found[site][bits] == pytest.approx(values, abs=1)
