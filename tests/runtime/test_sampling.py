import numpy as np
import pytest
import torch

from moqc.errors import UserError
from moqc.runtime.sampling import Sampler, Sampling, distribution


def test_greedy_takes_the_first_maximum():
    assert Sampler(Sampling()).choose(np.array([0.0, 3.0, 3.0, 1.0], np.float32)) == 1


def test_distribution_is_softmax():
    logits = np.array([1.0, 2.0, 4.0], np.float32)
    expected = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum()
    np.testing.assert_allclose(distribution(logits, Sampling(0.5)), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.4, [2]), (0.5, [2]), (0.51, [2, 0]), (0.8, [2, 0]), (0.81, [0, 1, 2]), (1.0, [0, 1, 2, 3])],
)
def test_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, kept):
    probabilities = np.array([0.3, 0.15, 0.5, 0.05])
    result = distribution(np.log(probabilities).astype(np.float32), Sampling(1.0, top_p))
    assert sorted(np.flatnonzero(result)) == sorted(kept)
    np.testing.assert_allclose(result[kept], probabilities[kept] / probabilities[kept].sum(), rtol=1e-5)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"),
    [(1, 1.0, [2]), (2, 1.0, [2, 0]), (0, 1.0, [0, 1, 2, 3]), (9, 1.0, [0, 1, 2, 3]), (2, 0.6, [2])],
)
def test_top_k_comes_before_top_p(top_k, top_p, kept):
    """Of the two most likely, 0.5 and 0.3, the first has 0.625 of their probability."""
    probabilities = np.array([0.3, 0.15, 0.5, 0.05])
    result = distribution(np.log(probabilities).astype(np.float32), Sampling(1.0, top_p, top_k=top_k))
    assert sorted(np.flatnonzero(result)) == sorted(kept)
    np.testing.assert_allclose(result[kept], probabilities[kept] / probabilities[kept].sum(), rtol=1e-5)


def test_the_distribution_is_that_of_transformers():
    from transformers.generation import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 3
    warpers = [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8)]
    warped = LogitsProcessorList(warpers)(None, torch.from_numpy(logits[None]))
    result = distribution(logits, Sampling(0.7, 0.8, top_k=20))
    np.testing.assert_allclose(result, torch.softmax(warped, -1)[0].numpy(), atol=1e-6)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.6, 0.3, 0.1])).astype(np.float32)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9, seed=0))
    counts = np.bincount([sampler.choose(logits) for _ in range(3000)], minlength=3)
    np.testing.assert_allclose(counts / 3000, [2 / 3, 1 / 3, 0.0], atol=0.03)
    assert counts[2] == 0


def test_huge_logits_do_not_overflow():
    assert Sampler(Sampling(temperature=0.01, seed=1)).choose(np.array([1e30, 3e30, -1e30], np.float32)) == 1


@pytest.mark.parametrize(
    "options", [{"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 1.1}, {"top_k": -1}]
)
def test_out_of_range(options):
    with pytest.raises(UserError):
        Sampling(**options)
