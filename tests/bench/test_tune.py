from __future__ import annotations

import json
from dataclasses import fields
from functools import partial

import pytest

from moqc.bench import tune as tuning
from moqc.bench import tune_cpu
from moqc.bench.layer import Layer
from moqc.bench.search import Search, Space
from moqc.bench.shapes import SHAPES, Shape
from moqc.bench.tune import tune
from moqc.errors import InternalError, TargetError, UserError
from moqc.schedules.cpu.plan import TUNED, RowsPlan, default_plans
from moqc.schedules.cpu.space import SPACE, draw, neighbours

TINY = Shape(experts=6, top_k=2, hidden=64, intermediate=96)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(tune_cpu, "COLD_BYTES", 1)
    monkeypatch.setattr(tune_cpu, "SECONDS", dict.fromkeys(tune_cpu.SECONDS, 0.0))


def test_a_search_goes_on_from_the_best():
    search = Search(Space(RowsPlan(), neighbours, partial(draw, RowsPlan)))
    first = search.propose()
    assert first != RowsPlan()
    search.report(first, 0.9)
    second = search.propose()
    names = [each.name for each in fields(RowsPlan)]
    assert sum(getattr(first, name) != getattr(second, name) for name in names) == 1
    search.report(second, 0.95)
    assert search.best == first
    assert len({search.propose() for _ in range(20)} | {first, second}) > 8


def test_records_are_written_continued_and_refused(tmp_path, monkeypatch):
    out = tmp_path / "records.json"
    rows = tune(out, shapes=["tiny"], bits=["4", "4/2"], trials=1)
    assert [(row["kernel"], row["tokens"], row["several"]) for row in rows] == [
        (kernel, tokens, several)
        for several in (False, True)
        for kernel in ("gate_up", "down")
        for tokens in (1, 32, 512)
    ]
    assert all(row["microseconds"] <= row["rule_microseconds"] and row["tried"] == 2 for row in rows)
    assert rows[0]["format"] == "int4-g64"
    written = json.loads(out.read_text())
    assert written["records"] == rows
    monkeypatch.setattr(tuning, "_tune", lambda *_: pytest.fail("measured again"))
    assert tune(out, shapes=["tiny"], bits=["4", "4/2"], trials=1) == rows
    out.write_text(json.dumps({**written, "source": "another machine"}))
    with pytest.raises(UserError, match="another machine"):
        tune(out, shapes=["tiny"], bits=["4"], trials=1)


def test_wrong_kernels_are_not_recorded(tmp_path, monkeypatch):
    expected = Layer.expected
    monkeypatch.setattr(Layer, "expected", lambda *arguments: 1.01 * expected(*arguments))
    with pytest.raises(InternalError, match=r"relative error 9\.9e-03 against the reference"):
        tune(tmp_path / "records.json", shapes=["tiny"], bits=["4"], trials=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"shapes": ["no-such"]}, UserError),
        ({"shapes": ["4x5x64x64"]}, UserError),
        ({"trials": 0}, UserError),
        ({"target": "cuda"}, TargetError),
        ({"target": "opencl"}, TargetError),
        ({"target": "aarch64"}, TargetError),
    ],
)
def test_bad_input(tmp_path, options, error):
    with pytest.raises(error):
        tune(tmp_path / "records.json", **options)
    assert not list(tmp_path.iterdir())


def test_default_plans_are_in_the_space():
    for plan in (getattr(default_plans(lanes), part) for part in TUNED for lanes in (8, 16)):
        assert all(getattr(plan, name) in values for name, values in SPACE[type(plan)].items())
        assert type(plan).parse(str(plan)) == plan
