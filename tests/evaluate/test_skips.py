"""Rules of pruning side by side on a tiny random model."""

import numpy as np
import pytest
import torch
from small_models import make_config

from moqc.calibrate.routing import PrunedExperts
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace
from moqc.errors import UserError
from moqc.evaluate.bench import Bench
from moqc.evaluate.metrics import Accumulator, mean_scores
from moqc.evaluate.skip_scores import Tally
from moqc.evaluate.skips import SkipChoices, compare_skips
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.gate import random_model
from moqc.frontend.trace import outline
from moqc.passes.base import PassContext
from moqc.pipelines import Plan
from moqc.quant.skips import RULES
from moqc.targets import Roofline, Target

EXPERTS, TOP_K, LAYERS, SHARES = 8, 4, 2, (0.25, 0.4)
BANDWIDTH, LAYER_SECONDS = 1e8, 1e-4
BOX = Target(
    "box", {"kind": "llvm"}, frozenset(), roofline=Roofline(BANDWIDTH, 1e15, LAYER_SECONDS, "made up")
)


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
    choices = SkipChoices(
        plans=[("uniform:rtn", Plan.parse("uniform:rtn"))],
        bits=[4.8],
        shares=SHARES,
        rules=list(RULES),
        linears="none",
        target=BOX,
        model=outline(config),
    )
    found = [compare_skips(ctx, bench, windows, choices) for _ in range(2)]
    assert found[0] == found[1]  # the second comes from the cache
    return found[0]


def test_rows_are_every_rule_and_share_with_and_without_quantization(compared):
    settings = [("none", 0.0), *((rule, share) for share in SHARES for rule in RULES)]
    assert [(row.plan, row.rule, row.share) for row in compared.rows] == [
        (plan, *setting) for plan in ("none", "uniform:rtn") for setting in settings
    ]
    assert (compared.shares, compared.tokens, compared.files) == (SHARES, 5 * 19, ("a", "b"))
    assert set(compared.to_dict()["rows"][0]) == {
        "plan", "target_bits", "rule", "share", "skipped_fraction", "loss", "loss_increase",
        "standard_error", "kld", "active_bytes_per_token", "decode_tokens_per_s",
    }  # fmt: skip


def test_what_is_not_pruned_is_the_measure(compared):
    for plan in ("none", "uniform:rtn"):
        base, *rows = (row for row in compared.rows if row.plan == plan)
        assert (base.skipped_fraction, base.loss_increase, base.standard_error) == (0, 0, 0)
        for row in rows:
            assert row.skipped_fraction == pytest.approx(row.share, abs=0.1)
            assert row.loss_increase == pytest.approx(row.loss - base.loss)
            assert row.kld > base.kld
            assert 0 < row.standard_error < 1
    assert compared.rows[0].kld == 0


def test_bytes_are_those_of_the_experts_that_are_kept(compared):
    plain = [row for row in compared.rows if row.plan == "none"]
    expert = 3 * 32 * 32 * 4  # float32
    for row in plain[1:]:
        saved = plain[0].active_bytes_per_token - row.active_bytes_per_token
        assert saved == pytest.approx(row.skipped_fraction * LAYERS * TOP_K * expert, abs=2)
    quantized = [row for row in compared.rows if row.plan != "none"]
    assert quantized[0].active_bytes_per_token < plain[-1].active_bytes_per_token


def test_speed_is_predicted_from_what_is_read(compared):
    """Of a float32 model, where bytes in memory are those that are stored."""
    for row in (row for row in compared.rows if row.plan == "none"):
        seconds = row.active_bytes_per_token / BANDWIDTH + LAYERS * LAYER_SECONDS
        assert 1 / row.decode_tokens_per_s == pytest.approx(seconds, rel=1e-3)
    quantized = [row.decode_tokens_per_s for row in compared.rows if row.plan != "none"]
    assert min(quantized[1:]) > quantized[0] > compared.rows[0].decode_tokens_per_s
    assert (compared.target, "made up" in compared.speed_source) == ("box", True)


def test_scores_are_those_of_the_evaluation():
    """Means and divergences as `moqc.evaluate.metrics` has them, the error that of paired differences."""
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 30, (2, 3, 10))
    plain, other, reference = generator.standard_normal((3, 2, 3, 10, 30), np.float32)
    tallies, wanted = [Tally(), Tally()], []
    for tally, logits in zip(tallies, (plain, other), strict=True):
        files = []
        for file in range(2):
            accumulator = Accumulator()
            accumulator.add(tokens[file], logits[file], reference[file])
            files.append(accumulator.scores())
            for window in range(3):
                rows = (tokens, logits, reference)
                tally.add(file, *(torch.from_numpy(array[file, window]) for array in rows))
        wanted.append(mean_scores(files))
    found = tallies[1].outcome(tallies[0], PrunedExperts({}, 10))
    assert (found.loss, found.kld) == pytest.approx((wanted[1].loss, wanted[1].kld_mean))
    assert found.increase == pytest.approx(wanted[1].loss - wanted[0].loss)
    rises = torch.cat(tallies[1].losses[0] + tallies[1].losses[1])
    rises = (rises - torch.cat(tallies[0].losses[0] + tallies[0].losses[1])).reshape(2, -1)
    spread = rises.var(dim=1, correction=0).sum().item() / rises.shape[1]
    assert found.standard_error == pytest.approx(spread**0.5 / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rules": ["mass", "best"]}, "unknown pruning rule 'best': known are mass, odp"),
        ({"rules": []}, "no pruning rule: known are"),
        ({"shares": []}, "no share of the experts' work"),
        ({"bits": [17.0]}, "at most 16"),
    ],
)
def test_bad_choices_are_refused(change, message):
    good = {"plans": [], "bits": [], "shares": [0.2], "rules": ["mass"], "linears": "none"}
    with pytest.raises(UserError, match=message):
        SkipChoices(**good | change, target=BOX, model=None).check()
