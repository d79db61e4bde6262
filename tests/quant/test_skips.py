"""Limits for a share of the work: reached, cheapest first, and errors that are those of the block itself."""

import pytest
import torch

from moqc.errors import UserError
from moqc.quant.routing import Features, LiteralPruning, SitePruning, drop, gains, prune
from moqc.quant.skips import FIRST, RULES, RoutingSample, calibrate, most_share, skipped

EXPERTS, TOP_K, HIDDEN, WINDOW, ROWS = 6, 3, 8, 40, 12


def make(seed=0, sensitivity=1.0, renormalize=True):
    """A sample, and the outputs [T, k, H] that it was made of."""
    generator = torch.Generator().manual_seed(seed)
    tokens = ROWS * WINDOW
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(1)[:, :TOP_K]
    weights = torch.rand(tokens, TOP_K, generator=generator) ** 3 + 0.01
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    slopes = torch.randn(EXPERTS, HIDDEN, generator=generator) / 4
    found = gains(slopes, x, ids)
    outputs = torch.randn(tokens, TOP_K, HIDDEN, generator=generator) * (1 + ids[..., None])
    outputs = outputs * found[..., None].sqrt()
    return (
        RoutingSample(
            ids=ids,
            weights=weights,
            grams=outputs @ outputs.mT,
            features=Features.of(x, torch.arange(WINDOW).repeat(ROWS), found),
            sensitivity=torch.full((tokens,), sensitivity),
            strength=1.0 + torch.arange(EXPERTS),
            slopes=slopes,
        ),
        outputs,
        x,
    )


@pytest.mark.parametrize("renormalize", [True, False])
def test_harm_is_that_of_the_blocks_error(renormalize):
    sample, outputs, _ = make(sensitivity=2.0, renormalize=renormalize)
    assert sample.renormalize == renormalize
    keep = torch.rand(sample.ids.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    kept = drop(sample.ids, sample.weights, keep, renormalize)[1]
    change = (outputs * (sample.weights - kept)[..., None]).sum(1)
    assert sample.harm(keep, renormalize) == pytest.approx(2 * float(change.square().sum()), rel=1e-3)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_sample_says_is_skipped_is_what_the_rule_drops(rule):
    sample, _, x = make(0)
    pruning = calibrate(rule, {"a": sample}, 0.3)["a"]
    kept, _ = prune(pruning, x, sample.ids, sample.weights, sample.features.positions)
    assert torch.equal(kept >= 0, sample.keep(pruning))
    assert float((kept < 0).float().mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_every_rule_skips_the_share(rule, share):
    samples = {"a": make(0)[0], "b": make(1)[0]}
    prunings = calibrate(rule, samples, share)
    assert skipped(samples, prunings) == pytest.approx(share, abs=0.01)
    assert all(
        isinstance(p, LiteralPruning if rule == "odp-literal" else SitePruning) for p in prunings.values()
    )
    if rule == "odp":
        assert all(samples[site].skipped(p) == pytest.approx(share, abs=0.01) for site, p in prunings.items())
    if rule in ("mass", "odp"):
        early = samples["a"].features.positions < FIRST
        assert samples["a"].keep(prunings["a"])[early].all()


def test_mass_spares_the_site_where_errors_hurt():
    samples = {"a": make(0)[0], "b": make(0, sensitivity=20.0)[0]}
    prunings = calibrate("mass", samples, 0.3)
    assert samples["a"].skipped(prunings["a"]) > 1.5 * samples["b"].skipped(prunings["b"])


def test_mass_does_the_least_harm():
    samples = {"a": make(0)[0], "b": make(1, sensitivity=3.0)[0]}

    def harm(rule):
        prunings = calibrate(rule, samples, 0.3)
        return sum(
            sample.harm(sample.keep(prunings[site]), prunings[site].renormalize)
            for site, sample in samples.items()
        )

    assert harm("mass") < 0.5 * min(harm(rule) for rule in RULES if rule != "mass")


@pytest.mark.parametrize("share", [0.0, 0.66, 0.9])
def test_a_share_out_of_reach_is_refused(share):
    samples = {"a": make(0)[0]}
    assert most_share(samples) == pytest.approx(2 / 3)
    with pytest.raises(UserError, match=r"the most is 63\.3%"):
        calibrate("mass", samples, share)


def test_an_unknown_rule_is_refused():
    with pytest.raises(UserError, match=r"'best'.*mass, odp"):
        calibrate("best", {"a": make(0)[0]}, 0.1)
