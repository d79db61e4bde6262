"""The rules of expert pruning against brute force and hand-made cases."""

import pytest
import torch

from moqc.quant.routing import (
    DROPPED,
    Features,
    LiteralPruning,
    SitePruning,
    drop,
    keep_ratio,
    keep_worth,
    prune,
    renormalizes,
    router_margin,
)


def pruning(**options):
    defaults = {"kind": "mass", "limit": 0.9, "strength": torch.ones(6), "renormalize": True}
    return SitePruning(**{**defaults, **options})


def call(tokens=5, top_k=3, experts=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator) + 0.05
    x = torch.randn(tokens, 8, generator=generator)
    return x, ids, weights / weights.sum(1, keepdim=True), torch.arange(10, 10 + tokens)


def test_what_is_worth_it_is_kept_and_the_largest():
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.02, 0.03, 0.01], [0.4, 0.4, 0.1]])
    kept = keep_worth(scores, 0.3).tolist()
    assert kept == [[False, True, True], [False, True, False], [True, True, False]]
    assert keep_worth(scores, 0.0).all()


def test_slopes_scale_contributions_by_the_token():
    x, ids, weights, positions = call()
    ids[0, 1] = -1
    slopes = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)) / 3
    rule = pruning(slopes=slopes, strength=torch.linspace(0.5, 3, 6), exponent=2.0)
    found = rule.contributions(Features.of(x, positions, rule.gains(x, ids)), ids, weights)
    for token, row in enumerate(ids.tolist()):
        for slot, expert in enumerate(row):
            plain = (weights[token, slot] * rule.strength[expert]) ** 2 * (slopes[expert] @ x[token]).exp()
            assert float(found[token, slot]) == pytest.approx(0.0 if expert < 0 else float(plain), rel=1e-5)


def test_ratio_compares_with_the_largest_wherever_it_is():
    scores = torch.tensor([[0.1, 0.5, 0.3], [0.3, 0.3, 0.3]])
    assert keep_ratio(scores, 0.5).tolist() == [[False, True, True], [True, True, True]]


def test_a_dropped_pair_has_no_expert_and_the_rest_keeps_the_sum():
    ids, weights = drop(
        torch.tensor([[3, 1, 0]]), torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[True, True, False]]), True
    )
    assert ids.tolist() == [[3, 1, DROPPED]]
    assert weights.tolist()[0] == pytest.approx([0.625, 0.375, 0.0])
    _, plain = drop(ids, weights, torch.tensor([[True, False, True]]), False)
    assert plain.tolist()[0] == pytest.approx([0.625, 0.0, 0.0])


@pytest.mark.parametrize("kind", ["mass", "ratio"])
def test_strength_decides_as_the_weight_does(kind):
    x, ids, weights, positions = call()
    strength = torch.linspace(0.5, 3, 6)
    features = Features.of(x, positions, torch.ones(ids.shape))
    kept = pruning(kind=kind, strength=strength, limit=0.6).select(features, ids, weights)
    same = keep_worth if kind == "mass" else keep_ratio
    assert torch.equal(kept, same(weights * strength[ids], 0.6))
    assert 0 < int((~kept).sum()) < kept.numel()


def test_an_expert_without_strength_is_never_kept():
    x, ids, weights, positions = call(first := 4)
    strength = torch.ones(6)
    strength[ids[:, 0]] = 0
    rule = pruning(strength=strength, limit=0.0, first=100)
    kept_ids, kept = prune(rule, x, ids, weights, positions)
    assert not (torch.isin(ids, torch.nonzero(strength == 0)) & (kept_ids != DROPPED)).any()
    alive = (kept_ids != DROPPED).any(1)
    assert torch.allclose(kept.sum(1)[alive], torch.ones(int(alive.sum())))
    assert first == len(kept_ids)


def test_nothing_left_is_zero_and_not_nan():
    x, ids, weights, positions = call()
    kept_ids, kept = prune(pruning(strength=torch.zeros(6)), x, ids, weights, positions)
    assert (kept_ids == DROPPED).all()
    assert (kept == 0).all()


def test_an_id_that_is_no_expert_stays_dropped():
    x, ids, weights, positions = call()
    ids[0, 1], ids[1, 2] = -1, 6
    kept_ids, kept = prune(pruning(limit=0.0), x, ids, weights, positions)
    assert (kept_ids[0, 1], kept_ids[1, 2]) == (DROPPED, DROPPED)
    assert (kept[0, 1], kept[1, 2]) == (0, 0)


def test_protected_tokens_keep_all_and_padding_nothing():
    x, ids, weights, _ = call()
    x[3, 5] = -50
    weights[4] = torch.tensor([0.34, 0.33, 0.33])
    positions = torch.tensor([0, 7, -1, 8, 9])
    kept = pruning(kind="ratio", limit=1.0, first=4, peak=40.0, margin=0.05).select(
        Features.of(x, positions, torch.ones(ids.shape)), ids, weights
    )
    assert kept.sum(1).tolist() == [3, 1, 0, 3, 3]


def test_margin_is_that_of_the_two_largest():
    weights = torch.tensor([[0.1, 0.5, 0.3], [0.2, 0.2, 0.1]])
    assert router_margin(weights).tolist() == pytest.approx([0.25, 0.0])
    assert router_margin(torch.ones(2, 1)).tolist() == [1, 1]


def test_a_constant_sum_is_a_renormalization():
    weights = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    assert not renormalizes(weights)
    assert renormalizes(2.5 * weights / weights.sum(1, keepdim=True))
    assert renormalizes(weights / weights.sum(1, keepdim=True) * (1 + 1e-4 * torch.randn(50, 1)))


def test_literal_protection_is_the_norm_over_the_tokens_left():
    window, rows = 100, 2
    x = torch.ones(rows * window, 4)
    x[7] = 400  # 1600 / 93 is above the last token's 4 / 1
    weights = torch.tensor([0.9, 0.1]).repeat(rows * window, 1)
    features = Features.of(x, torch.arange(window).repeat(rows), torch.ones(rows * window, 2))
    kept = LiteralPruning(0.5, True).select(features, torch.zeros(200, 2, dtype=torch.int64), weights)
    whole = kept.all(1).nonzero().flatten().tolist()
    assert whole == [7, 99, 198, 199]
    assert kept[:, 0].all()
    assert int(kept.sum()) == 200 + 4
