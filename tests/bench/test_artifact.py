from __future__ import annotations

import pytest

from moqc.bench.artifact import bench_artifact
from moqc.errors import UserError


@pytest.fixture(autouse=True)
def _threads(monkeypatch):
    """The number of threads is a variable of the process: it is put back."""
    monkeypatch.setenv("TVM_NUM_THREADS", "1")


def test_times_prompts_and_generation(toy):
    result = bench_artifact(toy.folder, prompts=[16], generated=[4], batch=2, repetitions=2, threads=1)
    assert [(row.test, row.batch, row.repetitions) for row in result.rows] == [("pp16", 2, 2), ("tg4", 2, 2)]
    assert all(0 < row.low <= row.tokens_per_s <= row.high for row in result.rows)
    assert result.threads == 1
    assert result.artifact_bytes > 0


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": [], "generated": []},
        {"prompts": [0], "generated": []},
        {"prompts": [10**6], "generated": []},
    ],
)
def test_bad_input(toy, options):
    with pytest.raises(UserError):
        bench_artifact(toy.folder, **options)
