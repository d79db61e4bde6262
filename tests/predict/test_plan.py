"""Plans from configurations: budgets are kept, ranges named, numbers add up."""

import json
from pathlib import Path

import pytest
import transformers

import moqc
from moqc.errors import BudgetError, ModelError, UserError
from moqc.frontend.trace import outline
from moqc.predict.plan import Deployment, make_plan
from moqc.predict.sizes import Storage, expert_weights, footprint, uniform_bits
from moqc.predict.speed import REACHED, decode_speed, other_speed, speed_source, with_bandwidth
from moqc.quant.formats import Format
from moqc.schedules.kernel_times import KernelTimes
from moqc.targets import Roofline

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "models" / "tiny-moe"
INT8 = Format.parse("int8-g64-sym")
MACHINE = Roofline(bandwidth=1e11, weight_rate=5e10, layer_seconds=1e-5, source="a test")
TIMES = KernelTimes(MACHINE, {})
DEPLOYMENT = Deployment(INT8, uniform=False, context=4096, batch=1, copied_bytes=0, times=TIMES)


@pytest.fixture(scope="module")
def mixtral():
    return outline(transformers.AutoConfig.for_model("mixtral"))


def test_mixtral_by_hand(mixtral):
    """46.7 B weights, 12.9 B a token; experts at exactly 2.5 bits, 8.25 for the rest but the routers."""
    stored = footprint(mixtral, Storage(2.5, uniform=False, linears=INT8))
    experts = 32 * 8 * 3 * 4096 * 14336
    attention = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096)
    vocabulary = 2 * 32000 * 4096
    router, norms = 32 * 8 * 4096, (2 * 32 + 1) * 4096
    assert expert_weights(mixtral) == experts
    assert stored.parameter_bytes == pytest.approx(
        experts * 2.5 / 8 + (attention + vocabulary) * 8.25 / 8 + 4 * (router + norms), abs=1
    )
    assert stored.kv_bytes_per_token == 32 * 2 * 8 * 128 * 4
    assert stored.token_weights == experts // 4 + attention + vocabulary // 2 + router


@pytest.mark.parametrize("name", ["int2-g64", "int4-g128"])
def test_uniform_bits_count_tables(mixtral, name):
    format = Format.parse(name)
    per_weight = format.bits + 24 / format.group
    assert uniform_bits(mixtral, format) == pytest.approx(per_weight + 192 / (3 * 4096 * 14336))


def test_size_budget_is_spent_and_kept(mixtral):
    size = 16 << 30
    chosen = make_plan(mixtral, "x", DEPLOYMENT, size=size).chosen
    assert size - 1000 < chosen.file_bytes <= size
    again = make_plan(mixtral, "x", DEPLOYMENT, bits=chosen.bits).chosen
    assert again.file_bytes == chosen.file_bytes


def test_latency_budget_is_spent_and_kept(mixtral):
    seconds = 0.15
    memory_bound = Deployment(INT8, False, 4096, 1, 0, KernelTimes(Roofline(3e10, 1e12, 1e-5, "a test"), {}))
    chosen = make_plan(mixtral, "x", memory_bound, latency=seconds).chosen
    assert chosen.speed.seconds == pytest.approx(seconds, rel=1e-6)
    assert chosen.speed.bound == "memory"
    assert chosen.speed.seconds <= seconds


def test_bound_names_what_limits(mixtral):
    stored = footprint(mixtral, Storage(2.5, False, INT8))
    slow = {
        "memory": Roofline(1e9, 1e12, 0.0, ""),
        "compute": Roofline(1e13, 1e9, 0.0, ""),
        "overhead": Roofline(1e13, 1e13, 1.0, ""),
    }
    for bound, machine in slow.items():
        assert decode_speed(mixtral, stored, KernelTimes(machine, {}), 0).bound == bound


def test_a_window_limits_what_is_read():
    model = outline(transformers.GptOssConfig())
    stored = footprint(model, Storage(4.0, False, INT8))
    near, far = (decode_speed(model, stored, TIMES, length).memory for length in (128, 1128))
    half = stored.kv_bytes_per_token / 2  # every other layer has a window of 128 tokens
    assert far - near == pytest.approx(1000 * half / MACHINE.bandwidth)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"bits": 0.5}, r"out of reach: plans take 1\.063 to"),
        ({"bits": 17.0}, "at most 16"),
        ({"size": 1 << 30}, "smallest plan"),
        ({"latency": 1e-6}, "smallest plan"),
    ],
)
def test_budgets_out_of_reach(mixtral, budget, message):
    with pytest.raises(BudgetError, match=message):
        make_plan(mixtral, "x", DEPLOYMENT, **budget)


def test_one_budget_is_needed(mixtral):
    for budgets in ({}, {"bits": 3.0, "size": 1 << 40}):
        with pytest.raises(UserError, match="one budget"):
            make_plan(mixtral, "x", DEPLOYMENT, **budgets)


def test_without_a_roofline_there_is_no_speed(mixtral):
    unknown = Deployment(INT8, False, 4096, 1, 0, KernelTimes(None, {}))
    content = make_plan(mixtral, "x", unknown, bits=3.0).to_dict()
    assert content["decode_tokens_per_s"] is None
    assert content["bound"] is None
    with pytest.raises(UserError, match="--bandwidth"):
        make_plan(mixtral, "x", unknown, latency=0.1)
    stated = with_bandwidth(KernelTimes(None, {}), 100.0)
    assert stated.machine.bandwidth == REACHED * 1e11
    with pytest.raises(UserError, match="above 0"):
        with_bandwidth(TIMES, 0.0)


def test_experts_take_the_times_that_were_measured(mixtral):
    """10 us for a matrix in int2-g128, 20 us in int4-g128: 15 us half way; 32 layers of 2 experts."""
    shapes = [(14336, 4096), (4096, 14336)]
    found = {(*shape, f"int{bits}-g128", 1): 5.0 * bits for shape in shapes for bits in (2, 4)}
    times = KernelTimes(MACHINE, found, source="a stop watch")
    half = footprint(mixtral, Storage(3 + 24 / 128, False, INT8))
    others = other_speed(mixtral, half, MACHINE, 0).seconds
    assert decode_speed(mixtral, half, times, 0).seconds == pytest.approx(others + 32 * 2 * 3 * 15e-6)
    assert speed_source(mixtral, half, times) == "experts: measured, a stop watch; the rest: a test"
    beyond = footprint(mixtral, Storage(4.5, False, INT8))
    assert decode_speed(mixtral, beyond, times, 0) == decode_speed(mixtral, beyond, TIMES, 0)
    assert speed_source(mixtral, beyond, times) == "a test"
    assert decode_speed(mixtral, half, with_bandwidth(times, 100.0), 0).seconds > 0.01


def test_configuration_alone_is_enough(tmp_path):
    (tmp_path / "config.json").write_bytes((TINY / "config.json").read_bytes())
    with_weights, without = moqc.plan(TINY, bits=2.5), moqc.plan(tmp_path, bits=2.5)
    copied = with_weights.chosen.file_bytes - without.chosen.file_bytes
    assert copied == sum(
        (TINY / name).stat().st_size
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
    )
    assert with_weights.chosen.stored == without.chosen.stored
    json.dumps(without.to_dict())


def test_an_artifact_is_no_model(toy):
    with pytest.raises(ModelError, match="moqc inspect"):
        moqc.plan(toy.folder, bits=3.0)


def test_a_shape_by_name():
    plan = moqc.plan("qwen3-30b-a3b", size=12 << 30)
    assert 30.5e9 < plan.total_weights < 30.6e9
    assert plan.chosen.file_bytes <= 12 << 30


def test_decoding_on_an_h200_is_as_measured():
    """Within 15 % of docs/benchmarks-h200.md's latest run: 4 bits, prompts of 512 tokens."""
    results = json.loads((ROOT / "benchmarks" / "results" / "h200-models.json").read_text())
    rows = [row for row in results["rows"] if row["provider"] == "moqc" and row.get("tokens") == 1]
    latest = {row["model"]: row["tokens_per_s"] for row in rows}
    assert set(latest) == {"olmoe-1b-7b", "qwen3-30b-a3b", "mixtral-8x7b"}
    for model, measured in latest.items():
        plan = moqc.plan(model, bits=4.13, target="cuda", context=512)
        assert plan.speed_source.startswith("experts: measured, NVIDIA H200")
        (_, _, rate) = plan.contexts[-1]
        assert 0.85 < rate / measured < 1.15, (model, rate, measured)


@pytest.mark.slow
def test_an_artifact_has_the_size_that_was_planned(tmp_path):
    """Within 1 %, library and manifest included."""
    options = {"bits": 4.5, "allocator": "uniform"}
    planned = moqc.plan(TINY, **options).chosen.file_bytes
    moqc.compile(TINY, tmp_path / "tiny", quantizer="rtn", **options)
    found = sum(path.stat().st_size for path in (tmp_path / "tiny").iterdir())
    assert abs(planned / found - 1) < 0.01, (planned, found)
