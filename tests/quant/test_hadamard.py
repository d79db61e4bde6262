from __future__ import annotations

import pytest
import torch
from scipy.linalg import hadamard

from moqc.quant import reference
from moqc.quant.activations import apply_activation, parse_activation, rotated_name
from moqc.quant.hadamard import BLOCK, rotate, rotate_moments


def explicit(columns: int) -> torch.Tensor:
    """R, from scipy's Hadamard matrices."""
    found = torch.eye(columns)
    for start in range(0, columns - BLOCK + 1, BLOCK):
        block = slice(start, start + BLOCK)
        found[block, block] = torch.from_numpy(hadamard(BLOCK) / BLOCK**0.5).float()
    return found


@pytest.mark.parametrize("columns", [7, 32, 70, 96])
def test_is_the_block_hadamard_matrix(columns):
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(columns))
    torch.testing.assert_close(rotate(x), x @ explicit(columns))
    torch.testing.assert_close(rotate(rotate(x)), x)
    torch.testing.assert_close(rotate(x)[..., columns // BLOCK * BLOCK :], x[..., columns // BLOCK * BLOCK :])


def test_moments_are_those_of_the_rotated_vectors():
    x = torch.randn(50, 70, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotate_moments(x.T @ x), rotate(x).T @ rotate(x), rtol=1e-5, atol=1e-4)


def test_names_round_trip():
    for name in ("silu_glu", "oai_swiglu(alpha=1.702,limit=7.0)"):
        rotated = parse_activation(rotated_name(name))
        assert rotated.rotated
        assert str(rotated) == f"{name}|hadamard32"
        assert str(rotated.elementwise) == name
        assert not parse_activation(name).rotated


def test_activation_rotates_what_it_gives():
    gate, up = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0)).unbind()
    expected = apply_activation("silu_glu", gate, up) @ explicit(64)
    torch.testing.assert_close(apply_activation("silu_glu|hadamard32", gate, up), expected)


def test_block_computes_the_same_with_down_rotated():
    g = torch.Generator().manual_seed(0)
    x, gate, up = (
        torch.randn(6, 16, generator=g),
        torch.randn(3, 70, 16, generator=g),
        torch.randn(3, 70, 16, generator=g),
    )
    down = torch.randn(3, 16, 70, generator=g)
    ids, weights = torch.tensor([[0, 1], [1, 2], [2, 0]] * 2), torch.rand(6, 2, generator=g)
    plain = reference.experts(x, ids, weights, gate, up, down, activation="silu_glu")
    rotated = reference.experts(x, ids, weights, gate, up, rotate(down), activation=rotated_name("silu_glu"))
    torch.testing.assert_close(rotated, plain, rtol=1e-4, atol=1e-4)
