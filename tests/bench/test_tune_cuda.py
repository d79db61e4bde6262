from __future__ import annotations

import pytest

from moqc.bench import tune_cuda
from moqc.bench.search import Search, Space
from moqc.bench.shapes import SHAPES, Shape
from moqc.bench.tune import tune
from moqc.bench.tune_cuda import _any, _near
from moqc.errors import TargetError
from moqc.quant.formats import Format
from moqc.schedules.cuda.plan import ExpertsShape
from moqc.schedules.cuda.quads import QuadsPlan, quads_bytes
from moqc.schedules.cuda.space import plan_space
from moqc.schedules.cuda.templates import block_bytes, parse_plan

INT8, INT2 = (Format.parse("int8-g128-sym"),), (Format.parse("int2-g128-sym"),)
QWEN3 = ExpertsShape(128, 8, 2048, 768, INT8, INT8, INT8)
SHARED = 227 * 1024


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
@pytest.mark.parametrize("tokens", [1, 8])
def test_a_search_tries_plans_that_fit(kernel, tokens):
    default, plans = plan_space(kernel, QWEN3, tokens, SHARED)
    search = Search(Space(default, lambda plan: _near(plans, plan), lambda generator: _any(plans, generator)))
    tried = [search.propose() for _ in range(6)]
    assert len({default, *tried}) == 7
    assert all(parse_plan(str(plan)) == plan and plan.tokens == tokens for plan in tried)
    near = _near(plans, default)
    assert near
    assert default not in near
    smaller = plan_space(kernel, QWEN3, tokens, 99 * 1024)[1]
    assert set(smaller) < set(plans) or tokens == 1
    projections = 2 if kernel == "gate_up" else 1
    assert max(block_bytes(plan, projections, INT8) for plan in smaller) <= 99 * 1024


@pytest.mark.parametrize("kernel", ["gate_up", "down"])
def test_int8_kernels_have_a_space_of_their_own(kernel):
    shape = ExpertsShape(128, 8, 2048, 768, INT2, INT2, INT2)
    default, plans = plan_space(kernel, shape, 8, 99 * 1024)
    assert default in plans
    assert _near(plans, default)
    assert all(isinstance(plan, QuadsPlan) for plan in plans)
    assert max(quads_bytes(plan, 1 + (kernel == "gate_up"), INT2, 64, 128) for plan in plans) <= 99 * 1024


def test_it_needs_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(tune_cuda, "absent_gpu", lambda: "there is no driver here (libcuda.so.1)")
    with pytest.raises(TargetError, match=r"no driver here \(libcuda.so.1\): run `moqc tune` where it is"):
        tune(tmp_path / "records.json", target="cuda")
    monkeypatch.setattr(tune_cuda, "absent_gpu", lambda: None)
    with pytest.raises(TargetError, match="name one architecture"):
        tune(tmp_path / "records.json", target="cuda:sm_80+sm_90")
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
def test_records_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setitem(SHAPES, "small", Shape(experts=16, top_k=8, hidden=1024, intermediate=512))
    monkeypatch.setattr(tune_cuda, "COLD_BYTES", 1)
    rows = tune(tmp_path / "records.json", shapes=["small"], bits=["4", "4/2"], trials=2, target="cuda")
    kernels = [(row["kernel"], row["tokens"]) for row in rows]
    assert kernels == 2 * [("gate_up", 1), ("down", 1), ("gate_up", 8), ("down", 8)]
    assert all(0 < row["microseconds"] <= row["rule_microseconds"] < 1000 for row in rows)
    assert all(row["tried"] > 1 for row in rows)
