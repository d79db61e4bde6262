"""The closed-form update of a linear map."""

import torch

from moqc.quant.ridge import boundary_shares, ridge_update


def problem():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 12, generator=generator), torch.randn(300, 12, generator=generator)
    shift = torch.randn(5, 12, generator=generator) * 0.1
    return weight, x, x @ (weight + shift).T, shift


def test_it_finds_a_map_that_exists():
    weight, x, wanted, shift = problem()
    new = ridge_update(weight, x, wanted, torch.ones(300), 1e-9)
    assert torch.allclose(new, weight + shift, atol=1e-4)


def test_outputs_that_are_right_change_nothing():
    weight, x, _, _ = problem()
    assert torch.allclose(ridge_update(weight, x, x @ weight.T, torch.rand(300), 0.1), weight, atol=1e-5)


def test_it_minimizes_the_damped_error():
    weight, x, wanted, _ = problem()
    wanted = wanted + torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    shares, damping = torch.rand(300, generator=torch.Generator().manual_seed(2)) + 0.5, 0.2
    ridge = damping * float((shares[:, None] * x.square()).sum(0).mean())

    def harm(candidate):
        error = (shares[:, None] * (x @ candidate.T - wanted).square()).sum()
        return float(error + ridge * (candidate - weight).square().sum())

    new = ridge_update(weight, x, wanted, shares, damping)
    for seed in range(5):
        step = torch.randn(new.shape, generator=torch.Generator().manual_seed(seed)) * 1e-2
        assert harm(new) < harm(new + step)


def test_close_choices_count_more():
    logits = torch.tensor([[3.0, 2.0, 1.99, 0.0], [3.0, 2.0, 0.0, 0.0]])
    close, clear = boundary_shares(logits, 2).tolist()
    assert 1 < clear < close < 2.001
    assert boundary_shares(logits, 4).tolist() == [1, 1]
