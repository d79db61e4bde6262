from __future__ import annotations

import pytest

from moqc.bench.memory import median_bandwidth, read_bandwidth
from moqc.targets import find_target


def test_reads_at_a_speed_a_memory_can_have():
    measure = read_bandwidth(find_target("native"), 1 << 22)
    assert 1e8 < measure() < 1e13


def test_the_median_of_several():
    values = iter([3.0, 1.0, 2.0])
    assert median_bandwidth(lambda: next(values), times=3) == pytest.approx(2.0)
