"""profile-weights: entropy and outliers by their formulas, element by element."""

import math
from typing import Any

import pytest
from tvm import IRModule

from moqc.calibrate.layers import LayeredModel
from moqc.ir.annotations import WEIGHTS
from moqc.passes.profile_weights import ProfileWeights


def test_against_plain_loops(moe: IRModule, calibrated: Any) -> None:
    found = WEIGHTS.of(ProfileWeights()(moe, calibrated))
    model = LayeredModel(calibrated.checkpoint)
    for site in model.layouts:
        block = model.experts(site)
        total, count = 0.0, 0
        for name in ("gate", "up", "down"):
            for expert, matrix in enumerate(block.matrices(name)):
                flat = matrix.flatten().tolist()
                mass = sum(math.exp(w) for w in flat)
                total += len(flat) * -sum(math.exp(w) / mass * math.log(math.exp(w) / mass) for w in flat)
                count += len(flat)
                columns = [[abs(w) for w in column] for column in matrix.T.tolist()]
                score = max(max(column) / (sum(column) / len(column)) for column in columns)
                assert found[site]["outliers"][name][expert] == pytest.approx(score * 1e6, rel=1e-5)
        assert found[site]["entropy"] == pytest.approx(total / count * 1e9, rel=1e-6)
