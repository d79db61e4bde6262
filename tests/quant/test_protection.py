from __future__ import annotations

import pytest
import torch

from moqc.quant.formats import Format
from moqc.quant.gptq import quantize_gptq
from moqc.quant.protection import Protection, swing
from moqc.quant.rtn import quantize_rtn

FMT = Format.parse("int3-g32")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_swing_is_the_range_of_shares():
    energy = torch.tensor([[1.0, 1.0, 2.0], [60.0, 10.0, 30.0]])
    torch.testing.assert_close(swing(energy), torch.tensor([0.35, 0.15, 0.2]))


@pytest.mark.parametrize(
    ("share", "copies", "count"), [(0.01, 1, 32), (0.4, 1, 64), (0.01, 2, 16), (0.01, 3, 32), (0.2, 4, 24)]
)
def test_copies_fill_whole_tiles(share, copies, count):
    scores = normal(100).abs()
    found = Protection.choose(scores, share, copies)
    assert len(found.channels) == count
    assert len(found.added) % 32 == 0
    assert list(found.channels) == sorted(found.channels)
    assert scores[list(found.channels)].min() >= scores.topk(count).values.min()


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_split_matrix_gives_the_same_products(copies):
    protection, w, x = Protection((3, 17), copies), normal(4, 8, 40), normal(5, 40, seed=1)
    parts, inputs = protection.split(w, FMT), protection.extend(x)
    assert parts.shape == (4, 8, 40 + 2 * copies)
    torch.testing.assert_close(inputs @ parts.mT, x @ w.mT)
    torch.testing.assert_close(protection.moments(x.T @ x), inputs.T @ inputs)


def test_every_copy_takes_what_rounding_leaves():
    """The error of a protected channel, rounded to nearest, falls by the levels of the format a copy."""
    w, channels = normal(16, 64), tuple(range(32))
    errors = []
    for copies in (1, 2):
        protection = Protection(channels, copies)
        dense = quantize_rtn(protection.split(w, FMT), FMT).dequantize()
        whole = dense[:, :64].clone()
        for number in range(copies):
            whole[:, list(channels)] += dense[:, 64 + 32 * number :][:, :32]
        errors.append(float((whole - w)[:, :32].square().mean()))
    plain = float((quantize_rtn(w, FMT).dequantize() - w)[:, :32].square().mean())
    assert errors[0] < plain / 10
    assert errors[1] < errors[0] / 10


def test_gptq_uses_the_copies_of_strong_channels():
    """With the moments of extended inputs the second part corrects the first."""
    x = normal(300, 64)
    x[:, :4] *= 20
    w, moments = normal(1, 24, 64, seed=1), (x.T @ x).unsqueeze(0)
    protection = Protection.choose(moments[0].diagonal(), 0.05, 1)
    assert {0, 1, 2, 3} <= set(protection.channels)
    plain = quantize_gptq(w, moments, FMT)[1]
    found, loss = quantize_gptq(protection.split(w, FMT), protection.moments(moments), FMT)
    assert float(loss) < 0.3 * float(plain)
    out = protection.extend(x) @ found.dequantize()[0].T
    torch.testing.assert_close((out - x @ w[0].T).square().sum().double(), loss[0], rtol=1e-3, atol=0)
