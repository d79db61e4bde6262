import json
from pathlib import Path

import pytest

from moqc.errors import TargetError
from moqc.pipelines import ASYMMETRIC_FORMATS, TRELLIS_FORMATS
from moqc.quant.formats import Format
from moqc.schedules.kernel_times import kernel_times
from moqc.targets import Roofline, Target, find_target

INT3 = Format.parse("int3-g128")
MACHINE = Target("box", {"kind": "llvm"}, frozenset(), roofline=Roofline(1e9, 1e12, 0.0, "made up"))


def test_the_roofline_is_the_default(tmp_path: Path) -> None:
    times = kernel_times(MACHINE, tmp_path)
    assert times.microseconds(256, 512, INT3) == pytest.approx(INT3.stored_bits(256, 512) / 8 / 1e9 * 1e6)
    slow = Target("box", {"kind": "llvm"}, frozenset(), roofline=Roofline(1e15, 1e6, 0.0, "made up"))
    assert kernel_times(slow, tmp_path).microseconds(256, 512, INT3) == pytest.approx(256 * 512)
    unknown = Target("box", {"kind": "llvm"}, frozenset())
    with pytest.raises(TargetError, match="no time is known of a 256 x 512 matrix in int3-g128"):
        kernel_times(unknown, tmp_path).microseconds(256, 512, INT3)


def test_measured_times_come_first(tmp_path: Path) -> None:
    row = {"rows": 256, "columns": 512, "format": "int3-g128", "tokens": 1, "microseconds": 1.5}
    (tmp_path / "box.json").write_text(json.dumps({"schema": 2, "source": "a test", "matrices": [row]}))
    times = kernel_times(MACHINE, tmp_path)
    assert times.microseconds(256, 512, INT3) == 1.5
    assert times.microseconds(256, 512, INT3, tokens=8) != 1.5
    assert times.microseconds(512, 512, INT3) != 1.5


def test_a_budget_of_time_wants_measured_trellises(tmp_path: Path) -> None:
    trellis = Format.parse("tcq2-g128")
    unknown = kernel_times(MACHINE, tmp_path)
    assert unknown.binding(256, 512, INT3) == unknown.microseconds(256, 512, INT3)
    with pytest.raises(TargetError, match="a 256 x 512 matrix in tcq2-g128, which takes longer than"):
        unknown.binding(256, 512, trellis)
    names = {"int2-g128-sym-s8": 1.0, "tcq2-g128": 9.0, "int3-g128": 2.0}
    rows = [
        {"rows": 256, "columns": 512, "format": name, "tokens": 1, "microseconds": us}
        for name, us in names.items()
    ]
    (tmp_path / "box.json").write_text(json.dumps({"schema": 2, "source": "a test", "matrices": rows}))
    times = kernel_times(MACHINE, tmp_path)
    assert times.binding(256, 512, trellis) == 9.0
    assert times.between(256, 512, 2.0625) == pytest.approx(1.0)  # that of integers


@pytest.mark.parametrize("text", ["{", '{"schema": 1}', '{"schema": 2}', '{"schema": 2, "matrices": [{}]}'])
def test_damaged_tables_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "box.json").write_text(text)
    with pytest.raises(TargetError, match=r"box\.json"):
        kernel_times(MACHINE, tmp_path)


def test_the_shipped_table_serves_all_candidates() -> None:
    times = kernel_times(find_target("cuda:sm_90@x86-64-v4"))
    for name in (*ASYMMETRIC_FORMATS, *TRELLIS_FORMATS):
        for rows, columns in ((14336, 4096), (4096, 14336), (768, 2048), (2048, 768), (1024, 2048)):
            assert (rows, columns, name, 1) in times.measured
            assert (rows, columns, name, 8) in times.measured
    assert times.measured == kernel_times(find_target("cuda")).measured
    assert kernel_times(find_target("cuda:sm_80")).measured == {}
