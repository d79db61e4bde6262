from __future__ import annotations

from moqc.bench.memory import read_bandwidth
from moqc.targets import find_target


def test_reads_at_a_speed_a_memory_can_have():
    measure = read_bandwidth(find_target("native"), 1 << 22)
    assert 1e8 < measure() < 1e13
