"""Samples of routing from a real tiny model, pruned forwards, and the share of the work for a loss."""

import pytest
import torch

from moqc.calibrate import skipping as module
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.routing import PrunedExperts, collect_samples, measure_losses
from moqc.calibrate.skipping import Skipping
from moqc.calibrate.workspace import Workspace
from moqc.errors import UserError
from moqc.quant.routing import SitePruning, gains

SHARES = (0.05, 0.1, 0.2, 0.9)


@pytest.fixture
def checkpoint(small):
    return small("qwen3_moe").checkpoint


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "cache")


@pytest.fixture
def skipping(checkpoint, calibration, workspace):
    return Skipping.of(checkpoint, calibration, workspace)


def test_samples_are_what_the_blocks_compute(checkpoint, calibration, workspace):
    samples = collect_samples(checkpoint, calibration, workspace)
    model = LayeredModel(checkpoint)
    assert list(samples) == list(model.layouts)
    site, sample = next(iter(samples.items()))
    window = calibration.tokens[0].shape[1]
    assert sample.features.positions.tolist()[: window + 1] == [*range(window), 0]
    calls = []
    original = model.original_experts(0)
    stream = model.start([torch.from_numpy(calibration.tokens[0][:1])])
    with model.layer(0) as layer:
        layer.run(stream, lambda call: calls.append(call) or original(call))
    call = calls[0]
    assert call.site == site
    assert torch.equal(sample.ids[:window], call.ids)
    squares = original(call).square().sum(1)
    nothing = sample.harm(torch.zeros(sample.ids.shape, dtype=torch.bool), False)
    assert nothing > 0
    found = torch.einsum("ti,tij,tj->t", sample.weights, sample.grams, sample.weights)
    assert torch.allclose(found[:window], squares, rtol=1e-3)
    assert (sample.sensitivity[: window - 1] > 0).all()
    assert torch.allclose(sample.features.gains[:window], gains(sample.slopes, call.x, call.ids), rtol=1e-4)


def test_contributions_predict_the_norms_of_outputs(checkpoint, calibration, workspace):
    """Better than what an expert contributes on average."""
    for sample in collect_samples(checkpoint, calibration, workspace).values():
        actual = sample.grams.diagonal(dim1=1, dim2=2).log()
        mean = torch.zeros(sample.experts).index_add_(0, sample.ids.flatten(), actual.flatten())
        mean /= sample.ids.flatten().bincount(minlength=sample.experts).clamp(min=1)
        rest = actual - mean[sample.ids]
        guess = 2 * sample.strength[sample.ids].log() + sample.features.gains.log() - mean[sample.ids]
        assert torch.corrcoef(torch.stack([rest.flatten(), guess.flatten()]))[0, 1] > 0.2


def test_a_pruned_forward_counts_what_it_skips(skipping, checkpoint, calibration):
    prunings = skipping.prunings("mass", 0.3)
    counter = PrunedExperts(prunings, calibration.tokens[0].shape[1])
    LayeredModel(checkpoint).forward(
        [torch.from_numpy(windows) for windows in calibration.tokens],
        lambda call: counter.around(LayeredModel(checkpoint).original_experts(_layer(call.site)))(call),
    )
    assert counter.skipped == pytest.approx(0.3, abs=0.12)
    assert all(int(counter.kept[site].sum()) < int(counter.chosen[site].sum()) for site in prunings)


def _layer(site):
    return int(site.split(".")[2])


def test_dropping_nothing_changes_no_loss(skipping, checkpoint, calibration, workspace):
    keep_all = {
        site: SitePruning("mass", 0.0, torch.ones(sample.experts), True)
        for site, sample in skipping.samples.items()
    }
    drop = skipping.prunings("mass", 0.3)
    rises = measure_losses(checkpoint, calibration, workspace, [keep_all, drop], "test")
    assert abs(rises[0]) < 1e-6 < abs(rises[1])
    assert measure_losses(checkpoint, calibration, workspace, [], "test") == rises


def test_the_share_for_a_loss_is_interpolated(skipping, monkeypatch):
    monkeypatch.setattr(module, "measure_losses", lambda *_: [0.001, 0.0005, 0.003])
    assert skipping.share_for("odp", 0.002, SHARES) == pytest.approx(0.15)
    assert skipping.share_for("odp", 0.001, SHARES) == pytest.approx(0.1)
    assert skipping.share_for("odp", 1.0, SHARES) == 0.2
    with pytest.raises(UserError, match=r"skipping 5% of the experts' work \(0\.0010\)"):
        skipping.share_for("odp", 0.0009, SHARES)
