from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from moqc.errors import TargetError
from moqc.quant.formats import Format
from moqc.schedules import plan_records as records
from moqc.schedules.cpu.plan import PanelPlan, Plans, RowsPlan, SeveralPlan, default_plans, find_plans
from moqc.schedules.kernel_times import kernel_times
from moqc.targets import find_target

FORMATS = (Format.parse("int4-g128"),)
SIZES = (7, 2, 96, 80)  # of no known model
ROW = {
    **dict(zip(records.KEY, records.record_key("down", 1, SIZES, FORMATS), strict=True)),
    "format": "int4-g128",
    "plan": "t2a32u4",
    "microseconds": 14.0,
}


def _file(folder: Path, *rows: dict[str, object], schema: int = 1) -> Path:
    path = folder / "own.json"
    path.write_text(json.dumps({"schema": schema, "source": "a test", "records": rows}))
    return path


def test_plans_come_from_the_users_file_where_the_shape_agrees(tmp_path):
    target = replace(find_target("x86-64-v3"), records=str(_file(tmp_path, ROW)))
    found = find_plans(target, "down", SIZES, FORMATS)
    assert found == Plans(few=RowsPlan(2, 32, 4), recorded={"few": "a test"})
    assert found.facts == {
        "plans": {"few": "t2a32u4", "several": str(SeveralPlan()), "many": str(PanelPlan())},
        "recorded": {"few": "a test"},
    }
    for kernel, sizes, formats in (
        ("gate_up", SIZES, FORMATS),
        ("down", (7, 2, 96, 96), FORMATS),
        ("down", SIZES, (Format.parse("int3-g128"),)),
        ("down", SIZES, (*FORMATS, Format.parse("int2-g64"))),
    ):
        assert find_plans(target, kernel, sizes, formats) == default_plans(8)


def test_the_users_file_has_times_of_matrices(tmp_path):
    target = replace(find_target("x86-64-v3"), records=str(_file(tmp_path, ROW)))
    assert kernel_times(target).microseconds(96, 80, FORMATS[0]) == pytest.approx(7.0)  # two experts are hit


@pytest.mark.parametrize("text", ["{", '{"schema": 2}', '{"schema": 1, "source": "s", "records": [{}]}'])
def test_damaged_files_are_refused(tmp_path, text):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(TargetError, match=r"own\.json"):
        records.read(path)
    with pytest.raises(TargetError, match="moqc tune"):
        records.read(tmp_path / "none.json")


@pytest.mark.parametrize("path", sorted(records.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_records_are_no_slower_than_the_rules(path):
    found = records.read(path)
    formats = [(*(row[name] for name in records.KEY), row.get("format")) for row in found.rows]
    assert len(set(formats)) == len(found.rows) > 0
    assert all(row["microseconds"] <= row["rule_microseconds"] for row in found.rows)
