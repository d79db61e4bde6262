"""Plans found by search: what is recorded fits, and is used where it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import ROWS
from moqc.schedules.cuda import records
from moqc.schedules.cuda.plan import SHARED_BYTES, ExpertsShape, Plan, gate_up_rule, shared_bytes
from moqc.schedules.cuda.quads import QuadsPlan, quads_bytes, quads_rules
from moqc.schedules.cuda.quads_layer import gate_up_quads_of
from moqc.schedules.cuda.rows import RowsPlan, rows_bytes
from moqc.schedules.cuda.space import down_space, gate_up_space, sample
from moqc.schedules.cuda.templates import down_of, gate_up_of, parse_plan
from moqc.schedules.plan_records import KEY, Key, read
from moqc.targets import find_target

INT4, INT2 = (Format.parse("int4-g128-sym"),), (Format.parse("int2-g128-sym"),)
BY_32 = Format.parse("int4-g32")
"""What the int8 kernels for several tokens do not have."""
QWEN3 = ExpertsShape(128, 8, 2048, 768, INT4, INT4, INT4)


def record_key_of(row: Mapping[str, Any]) -> Key:
    return tuple(row[name] for name in KEY)


def test_records_name_their_machine_and_are_in_the_space():
    found = records.load()
    assert "H200" in found.source
    measured = [(record_key_of(row), row.get("format"), row.get("timed")) for row in found.rows]
    assert len(set(measured)) == len(measured)
    for row in found.rows:
        plan = parse_plan(row["plan"])
        rows, columns = row["intermediate"], row["hidden"]
        if row["kernel"].startswith("down"):
            rows, columns = columns, rows
        if isinstance(plan, QuadsPlan):
            plan.check(columns, row["kernel"] == "gate_up_quads", INT4)
            assert row["timed"] == "layer"
        elif isinstance(plan, RowsPlan):
            plan.check(columns, whole=row["kernel"] == "gate_up")
            assert plan.tokens <= row["tokens"]
        else:
            assert -(-rows // ROWS) % (plan.tiles * plan.items) == 0
            assert plan.tokens == row["tokens"]
        assert row["microseconds"] <= row["rule_microseconds"]


def test_a_record_is_used_with_warp_groups_only():
    wanted, decides = {"tokens": 1, "hidden": 2048}, records.load().plans
    row = next(
        row
        for row in records.load().rows
        if row["plan"] == decides[record_key_of(row)] != row["rule"] and wanted.items() <= row.items()
    )
    form = Format(row["bits"], 128, symmetric=not row["zeros"])
    formats = (form, Format.parse("int2-g64")) if row["several"] else (form,)
    sizes = (row["experts"], row["top_k"], row["hidden"], row["intermediate"])
    shape = ExpertsShape(*sizes, formats, formats, formats)
    name = f"{row['kernel']}_{row['tokens']}"
    plans, recorded = records.plans(shape, SHARED_BYTES, [records.load()])
    assert str(plans[name]) == row["plan"]
    assert recorded[name] == records.load().source
    plans, recorded = records.plans(shape, SHARED_BYTES)
    assert str(plans[name]) != row["plan"]
    assert recorded == {}
    other = replace(shape, hidden=shape.hidden + 256)
    assert records.find(row["kernel"], other, row["tokens"], records.load()) is None


def test_the_users_records_come_first(tmp_path):
    wanted = {"tokens": 8, "bits": 4, "kernel": "gate_up", "several": False}
    row = next(row for row in records.load().rows if wanted.items() <= row.items())
    path, plan = tmp_path / "own.json", "w8t1r1m8i1" if row["hidden"] <= 2048 else "w16t1r1m8i1"
    content = {"schema": 1, "source": "mine", "target": "cuda", "records": [{**row, "plan": plan}]}
    path.write_text(json.dumps(content))
    form = Format.parse(row["format"])
    sizes = (row["experts"], row["top_k"], row["hidden"], row["intermediate"])
    shape, name = ExpertsShape(*sizes, (form,), (form,), (BY_32,)), "gate_up_8"
    for architectures, first in (("sm_90", 2), ("sm_80", 1)):
        sources = records.sources(replace(find_target(f"cuda:{architectures}"), records=str(path)))
        assert len(sources) == first
        plans, recorded = records.plans(shape, SHARED_BYTES, sources)
        assert (str(plans[name]), recorded[name]) == (plan, "mine")


@pytest.mark.parametrize("tokens", [1, 8])
def test_the_space_holds_what_can_be_built(tokens):
    for plan in sample(gate_up_space(QWEN3, tokens), 40):
        assert shared_bytes(plan, 2, INT4) <= SHARED_BYTES
        assert gate_up_of(QWEN3, plan, "int32")[1] == shared_bytes(plan, 2, INT4)
    for plan in sample(down_space(QWEN3, tokens), 40):
        assert down_of(QWEN3, plan, "int32", adds=True)[1] == shared_bytes(plan, 1, INT4)


def test_plans_are_read_as_written():
    plan = gate_up_rule(QWEN3, 8)
    assert Plan.parse(str(plan)) == plan
    with pytest.raises(InternalError, match="no plan"):
        Plan.parse("w8t")
    assert str(parse_plan("w28p28u16k1d1m8")) == "w28p28u16k1d1m8"
    with pytest.raises(InternalError, match="no plan"):
        parse_plan("w28p")


def test_a_plan_whose_warps_own_rows_cuts_whole_units():
    plan = RowsPlan(12, 12, 8, 1, 1, 16)
    assert gate_up_of(QWEN3, plan, "int32")[1] == rows_bytes(plan, 2, INT4) == 2 * (32 + 8 * (4096 + 64))
    for wrong in (replace(plan, units=4), replace(plan, split=2), replace(plan, warps=33)):
        with pytest.raises(InternalError, match="does not fit 8 units"):
            gate_up_of(QWEN3, wrong, "int32")
    with pytest.raises(InternalError, match="shared memory"):
        gate_up_of(QWEN3, replace(plan, tokens=64), "int32")


def test_smaller_shared_memory_means_smaller_plans():
    plans, _ = records.plans(QWEN3, 99 * 1024)
    for name, plan in plans.items():
        projections = 1 + name.startswith("gate")
        if isinstance(plan, QuadsPlan):
            assert quads_bytes(plan, projections, INT4, 8 * 8, 128) <= 99 * 1024
        else:
            assert shared_bytes(plan, projections, INT4) <= 99 * 1024


def test_several_tokens_go_by_int8_where_there_are_kernels():
    qwen3 = replace(QWEN3, gate=INT2, up=INT2, down=INT2)
    plans, _ = records.plans(qwen3, SHARED_BYTES)
    assert [str(plans[name]) for name in ("gate_up_8", "down_8")] == ["w8p3u8k4d2q8b2", "w8p8u3k3d1q8b2"]
    mixtral = ExpertsShape(8, 2, 4096, 14336, INT2, INT2, INT2)
    assert list(map(str, quads_rules(mixtral, SHARED_BYTES))) == ["w16p14u16k4d2q8b1", "w16p28u8k4d2q8b1"]
    by_64 = (Format.parse("int3-g64-sym"),)
    wide = replace(mixtral, gate=INT4, up=INT4, down=INT4)
    for layer in (wide, replace(qwen3, down=by_64), replace(qwen3, top_k=100)):
        plans, _ = records.plans(layer, SHARED_BYTES)
        assert isinstance(plans["gate_up_8"], Plan)  # bound by bytes; no kernel; many tokens an expert


def test_records_of_slots_are_not_for_int8_kernels(tmp_path):
    qwen3 = replace(QWEN3, gate=INT2, up=INT2, down=INT2)
    row = {"tokens": 8, "bits": 2, "several": False, "zeros": False}
    row |= dict(zip(("experts", "top_k", "hidden", "intermediate"), QWEN3.sizes, strict=True))
    for kernel, plan in (("down", "w8t8r2m8i1"), ("down_quads", "w4p4u3k1d3q8b4")):
        path = tmp_path / f"{plan}.json"
        path.write_text(
            json.dumps({"schema": 1, "source": "mine", "records": [{**row, "kernel": kernel, "plan": plan}]})
        )
        plans, recorded = records.plans(qwen3, SHARED_BYTES, [read(path)])
        used = kernel == "down_quads"
        assert isinstance(plans["down_8"], QuadsPlan)
        assert (str(plans["down_8"]) == plan, recorded) == (used, {"down_8": "mine"} if used else {})
        plans, recorded = records.plans(
            replace(qwen3, up=(Format.parse("int2-g32-sym"),)), SHARED_BYTES, [read(path)]
        )
        assert (recorded == {}) == used


def test_an_int8_plan_cuts_whole_units_of_formats_it_has():
    plan = QuadsPlan(8, 6, 8, 2, 2, 8, 2)
    assert parse_plan(str(plan)) == plan
    function, shared = gate_up_quads_of(QWEN3, plan, "int64", 8)
    assert "moqc::quads::gate_up<" in function
    activations, results = 8 * 2 * (2048 + 2 * 48 + 16), 2 * 6 * 2 * 2 * 16 * 8 * 4
    choices = 128 * 4 + 8 * 4 + 64 * 2  # counts of experts, pairs of a round, experts of pairs
    assert shared == choices + 32 + results + activations
    for wrong in ({"units": 4}, {"split": 3}, {"depth": 3}, {"tokens": 16}):
        with pytest.raises(InternalError, match="does not fit 8 units"):
            gate_up_quads_of(QWEN3, replace(plan, **wrong), "int64", 8)
    small = (Format.parse("int1-g64-sym"),)
    with pytest.raises(InternalError, match="no kernel for one of int1-g64-sym"):
        gate_up_quads_of(replace(QWEN3, gate=small, up=small), plan, "int64", 8)
    with pytest.raises(InternalError, match="shared memory"):
        gate_up_quads_of(QWEN3, replace(plan, pairs=30, split=4), "int64", 8)
