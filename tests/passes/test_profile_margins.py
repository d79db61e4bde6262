"""profile-margins: margins against the model's own router, probabilities against drawn noise."""

from typing import Any

import pytest
import torch

from moqc.calibrate import margins
from moqc.calibrate.capture import Batches
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.margins import Margins, measure_margins
from moqc.calibrate.routers import observe
from moqc.errors import PipelineError
from moqc.frontend.hf import import_model
from moqc.ir.annotations import MARGINS
from moqc.passes.profile_margins import ProfileMargins

ROUTER = "model.layers.{}.mlp.gate"


def measured(ctx: Any) -> dict[str, Margins]:
    names = [ROUTER.format(0), ROUTER.format(1)]
    return measure_margins(ctx.checkpoint, ctx.calibration, ctx.workspace, names, tokens=10**6)


def test_against_a_plain_loop(calibrated: Any) -> None:
    found = measured(calibrated)
    model = LayeredModel(calibrated.checkpoint)
    stream = model.start(Batches.of(calibrated.calibration).tokens)
    for index in range(model.layer_count):
        one, original = found[ROUTER.format(index)], model.original_experts(index)
        with model.layer(index) as layer:
            router = layer.submodule(ROUTER.format(index))
            probe = observe(layer, router, stream, original)
            weight = router.weight.detach()
            layer.run(stream, original)
        for token, (x, ids) in enumerate(zip(torch.cat(probe.inputs), torch.cat(probe.ids), strict=True)):
            logits = weight @ x
            chosen = set(ids.tolist())
            last = min(chosen, key=lambda e: float(logits[e]))
            first = max(set(range(len(weight))) - chosen, key=lambda e: float(logits[e]))
            assert one.pairs[token].tolist() == [last, first]
            assert float(one.margins[token]) == pytest.approx(float(logits[last] - logits[first]), abs=1e-5)
        assert int(one.counts.sum()) == torch.cat(probe.ids).numel()


def test_flips_are_those_of_drawn_noise(calibrated: Any) -> None:
    """The two experts of each token, 4,000 draws of noise of a tenth and of half of the input's norm."""
    model = LayeredModel(calibrated.checkpoint)
    stream = model.start(Batches.of(calibrated.calibration).tokens)
    one = measured(calibrated)[ROUTER.format(0)]
    with model.layer(0) as layer:
        router = layer.submodule(ROUTER.format(0))
        x = torch.cat(observe(layer, router, stream, model.original_experts(0)).inputs)[:20]
        weight = router.weight.detach()
    difference = weight[one.pairs[:20, 0]] - weight[one.pairs[:20, 1]]
    generator = torch.Generator().manual_seed(0)
    for noise in (0.1, 0.5):
        drawn = torch.randn(4000, *x.shape, generator=generator) * x.norm(dim=1, keepdim=True)
        moved = ((x + drawn * noise / x.shape[1] ** 0.5) * difference).sum(2)
        share = (moved < 0).double().mean(0)
        torch.testing.assert_close(one.flips(noise)[:20], share, atol=0.035, rtol=0)


def test_annotation(calibrated: Any) -> None:
    mod = import_model(calibrated.checkpoint)
    found = MARGINS.of(ProfileMargins(noise=0.2)(mod, calibrated))
    assert list(found) == [ROUTER.format(0), ROUTER.format(1)]
    for name, one in found.items():
        exact = measured(calibrated)[name]
        assert one["tokens"] == len(exact.margins)
        assert one["margin_ppm"] == sorted(one["margin_ppm"])
        assert one["margin_ppm"][2] == pytest.approx(
            float(exact.margins.median() / exact.spread) * 1e6, rel=0.05
        )
        flips = exact.flips(0.2)
        assert one["flips_ppm"] == pytest.approx(float(flips.mean()) * 1e6, abs=1)
        changed = sum(p / 1e6 * int(n) for p, n in zip(one["experts_ppm"], exact.counts, strict=True))
        assert changed == pytest.approx(2 * float(flips.sum()), rel=1e-3)  # one gains, one loses


def test_refusals(calibrated: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    mod = import_model(calibrated.checkpoint)
    with pytest.raises(PipelineError, match="noise=0 must be above 0"):
        ProfileMargins(noise=0.0)(mod, calibrated)
    monkeypatch.setattr(margins, "AGREEMENT", 1.1)
    with pytest.raises(PipelineError, match=r"layers\.0\.mlp\.gate chooses by more than its logits"):
        ProfileMargins(tokens=64)(mod, calibrated)
