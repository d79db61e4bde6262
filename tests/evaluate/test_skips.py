"""Rules of pruning side by side on a tiny random model."""

import numpy as np
import pytest
from small_models import make_config

from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.errors import UserError
from moqc.evaluate.bench import Bench
from moqc.evaluate.skips import check_rules, compare_skips
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.gate import random_model
from moqc.passes.base import PassContext
from moqc.pipelines import Plan
from moqc.quant.skips import RULES

EXPERTS, TOP_K, LAYERS, SHARE = 8, 4, 2, 0.25


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    sizes = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS, "num_experts_per_tok": TOP_K}
    config = make_config("qwen3_moe", **sizes, moe_intermediate_size=32)
    folder = tmp_path_factory.mktemp("skips")
    random_model(config).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    ctx = PassContext(
        checkpoint=Checkpoint.open(folder / "model"),
        calibration=CalibrationSet.of({"text": generator.integers(3, 64, (12, 24))}),
        workspace=Workspace(folder / "cache"),
    )
    windows = {"a": generator.integers(3, 64, (3, 20)), "b": generator.integers(3, 64, (2, 20))}
    bench = Bench.open(ctx.checkpoint, ctx.workspace, {})
    plans = [("uniform:rtn", Plan.parse("uniform:rtn"))]
    found = [compare_skips(ctx, bench, windows, plans, [4.8], SHARE, list(RULES)) for _ in range(2)]
    assert found[0] == found[1]  # the second comes from the cache
    return found[0]


def test_rows_are_every_rule_with_and_without_quantization(compared):
    rules = ["none", *RULES]
    assert [(row.plan, row.rule) for row in compared.rows] == [
        (plan, rule) for plan in ("none", "uniform:rtn") for rule in rules
    ]
    assert (compared.share, compared.tokens, compared.files) == (SHARE, 5 * 19, ("a", "b"))
    assert set(compared.to_dict()["rows"][0]) == {
        "plan", "target_bits", "rule", "skipped_fraction", "loss", "loss_increase", "kld",
        "active_bytes_per_token",
    }  # fmt: skip


def test_what_is_not_pruned_is_the_measure(compared):
    for plan in ("none", "uniform:rtn"):
        rows = [row for row in compared.rows if row.plan == plan]
        base = rows[0]
        assert (base.skipped_fraction, base.loss_increase) == (0, 0)
        for row in rows[1:]:
            assert row.skipped_fraction == pytest.approx(SHARE, abs=0.1)
            assert row.loss_increase == pytest.approx(row.loss - base.loss)
            assert row.kld > base.kld
    assert compared.rows[0].kld == 0


def test_bytes_are_those_of_the_experts_that_are_kept(compared):
    plain = [row for row in compared.rows if row.plan == "none"]
    expert = 3 * 32 * 32 * 4  # float32
    for row in plain[1:]:
        saved = plain[0].active_bytes_per_token - row.active_bytes_per_token
        assert saved == pytest.approx(row.skipped_fraction * LAYERS * TOP_K * expert, abs=2)
    quantized = [row for row in compared.rows if row.plan != "none"]
    assert quantized[0].active_bytes_per_token < plain[-1].active_bytes_per_token


def test_unknown_rules_are_refused():
    with pytest.raises(UserError, match=r"pruning rules best: known are mass, odp"):
        check_rules(["mass", "best"])
    with pytest.raises(UserError, match=r"\(none\)"):
        check_rules([])
