from __future__ import annotations

from pathlib import Path

import pytest

from moqc.bench import kernels
from moqc.bench.kernels import bench_kernels, parse_classes
from moqc.bench.layer import Layer
from moqc.bench.shapes import SHAPES, Shape, find_shape
from moqc.errors import TargetError, UserError
from moqc.quant.formats import Format

MODEL = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
TINY = Shape(experts=6, top_k=2, hidden=64, intermediate=96)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    monkeypatch.setattr(kernels, "COLD_BYTES", 1 << 20)
    monkeypatch.setattr(kernels, "SECONDS", 0.01)


@pytest.mark.parametrize("cold", [True, False])
def test_counts_the_bytes_of_the_experts_that_are_hit(cold):
    one, many = bench_kernels("native", "tiny", ["4/1"], [1, 50], cold=cold)
    four, single = (
        sum(fmt.stored_bits(*rc) for rc in [(96, 64), (96, 64), (64, 96)]) / 8
        for fmt in (Format(4), Format(1))
    )
    # One token hits two experts of six, which take the classes in turn; fifty hit all of them.
    assert round(one.gb_per_s * one.us * 1e3) in {round(2 * four), round(2 * single), round(four + single)}
    assert many.gb_per_s * many.us * 1e3 == pytest.approx(3 * (four + single))
    assert many.gflops * many.us * 1e3 == pytest.approx(2 * 50 * 2 * 3 * 64 * 96)
    assert one.weights == ("cold" if cold else "hot")
    assert one.read_gb_per_s > 0


def test_rows_come_by_bits_then_tokens_and_the_layers_share_the_rotated_bytes():
    rows = bench_kernels("native", "tiny", ["4", "2"], [1, 5])
    assert [(row.bits, row.tokens) for row in rows] == [("4", 1), ("4", 5), ("2", 1), ("2", 5)]


def test_cold_calls_visit_all_sets_before_one_comes_again(monkeypatch):
    layer = Layer(kernels.find_target("native"), TINY, [Format(4)], 1 << 20)
    calls = layer.calls(1)
    seen = [next(calls) for _ in range(3 * len(layer.sets))]
    sets = [id(weights) for _, _, weights in seen]
    assert len(set(sets[: len(layer.sets)])) == len(layer.sets) > 1
    hit = [set(ids.numpy().ravel().tolist()) for ids, _, _ in seen[:: len(layer.sets)]]
    assert set.union(*hit) == set(range(6))  # three turns of two experts


@pytest.mark.parametrize(
    ("text", "formats"), [("4", ["int4-g64"]), ("3/int2-g32-sym", ["int3-g64", "int2-g32-sym"])]
)
def test_classes(text, formats):
    assert parse_classes(text) == tuple(map(Format.parse, formats))


@pytest.mark.parametrize(
    "arguments",
    [("native", "no-such", ["4"], [1]), ("native", "tiny", ["5"], [1]), ("native", "tiny", ["4"], [0])],
)
def test_bad_input(arguments):
    with pytest.raises(UserError):
        bench_kernels(*arguments)


def test_gpus_are_timed_elsewhere():
    with pytest.raises(TargetError, match="time a compiled model with `moqc bench`"):
        bench_kernels("cuda", "tiny", ["4"], [1])


def test_a_folder_has_the_shape_of_its_model(tmp_path):
    assert find_shape(str(MODEL)) == Shape(16, 2, 128, 128)
    with pytest.raises(UserError, match=r"unknown shape 'olmo': known are .*, or the folder of a model"):
        find_shape("olmo")
    with pytest.raises(UserError, match=r"config\.json"):
        find_shape(str(tmp_path))
