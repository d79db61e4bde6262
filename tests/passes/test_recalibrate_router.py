"""recalibrate-router: agreement with the original routing rises, weights are float16 under their names."""

from dataclasses import replace

import numpy as np
import pytest

from moqc.calibrate.workspace import ParamStore
from moqc.errors import PipelineError
from moqc.frontend.hf import import_model
from moqc.ir.annotations import BITS, PARAMS, ROUTERS
from moqc.ir.sites import find_experts
from moqc.ir.verify import verify
from moqc.passes.recalibrate_router import RecalibrateRouter

ROUTER = "model.layers.{}.mlp.gate"


@pytest.fixture(scope="module")
def planned(calibrated):
    mod = import_model(calibrated.checkpoint)
    plan = {s.site: {name: ["int1-g128"] * s.experts for name in s.projections} for s in find_experts(mod)}
    return BITS.put(mod, plan)


def test_routing_follows_the_original(planned, calibrated, tmp_path):
    ctx = replace(calibrated, params=ParamStore(tmp_path))
    mod = RecalibrateRouter(quantizer="rtn")(planned, ctx)
    verify(mod)
    assert PARAMS.of(mod) == PARAMS.of(planned)
    report = ROUTERS.of(mod)
    assert list(report) == [ROUTER.format(0), ROUTER.format(1)]
    first, second = report.values()
    assert first["before_ppm"] == 1_000_000  # nothing before the first router is quantized
    assert first["after_ppm"] > 990_000
    assert second["before_ppm"] < second["after_ppm"] <= 1_000_000
    for name in report:
        weight, old = ctx.params.get(f"{name}.weight"), calibrated.checkpoint.load(f"{name}.weight")
        assert weight.dtype == np.float16
        assert weight.shape == tuple(old.shape)
    assert not np.allclose(weight, old.float().numpy(), atol=1e-3)


def test_damping_is_positive(planned, calibrated, tmp_path):
    ctx = replace(calibrated, params=ParamStore(tmp_path))
    with pytest.raises(PipelineError, match="damping=0 must be above 0"):
        RecalibrateRouter(damping=0.0)(planned, ctx)
