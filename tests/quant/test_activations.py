import math

import pytest
import torch

from moqc.errors import InternalError, UserError
from moqc.quant.activations import ACTIVATIONS, CONSTANTS, Activation, apply_activation, parse_activation


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2


# (name, function of gate and up), written out in plain Python.
CASES = [
    ("silu_glu", lambda g, u: g * sigmoid(g) * u),
    ("gelu_glu", lambda g, u: gelu(g) * u),
    (
        "gelu_tanh_glu",
        lambda g, u: g / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3))) * u,
    ),
    ("relu_glu", lambda g, u: max(g, 0) * u),
    (
        "oai_swiglu(alpha=1.702,limit=7.0)",
        lambda g, u: min(g, 7) * sigmoid(1.702 * min(g, 7)) * (max(-7, min(u, 7)) + 1),
    ),
    ("silu_glu_clamp(limit=2.5)", lambda g, u: min(g, 2.5) * sigmoid(min(g, 2.5)) * max(-2.5, min(u, 2.5))),
    ("silu_glu_postclamp(limit=2.5)", lambda g, u: min(g * sigmoid(g), 2.5) * max(-2.5, min(u, 2.5))),
    ("silu", lambda _, u: u * sigmoid(u)),
    ("gelu", lambda _, u: gelu(u)),
    ("relu2", lambda _, u: max(u, 0) ** 2),
]


@pytest.mark.parametrize(("name", "function"), CASES, ids=[name for name, _ in CASES])
def test_values(name: str, function) -> None:
    activation = parse_activation(name)
    assert str(activation) == name
    g, u = torch.meshgrid(torch.linspace(-9, 9, 13), torch.linspace(-8.5, 8.5, 11), indexing="ij")
    pairs = torch.stack([g, u], -1).reshape(-1, 2).tolist()
    expected = torch.tensor([function(a, b) for a, b in pairs])
    actual = apply_activation(name, g.flatten() if activation.has_gate else None, u.flatten())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_every_kind_is_tested() -> None:
    assert {parse_activation(name).kind for name, _ in CASES} == set(ACTIVATIONS)
    assert set(CONSTANTS) <= set(ACTIVATIONS)


def test_parse_gives_constants() -> None:
    assert parse_activation("oai_swiglu(alpha=1.5, limit=7)") == Activation("oai_swiglu", 1.5, 7.0)


@pytest.mark.parametrize(
    "name",
    [
        "swish",
        "silu_glu(limit=3)",
        "oai_swiglu",
        "oai_swiglu(limit=7,alpha=1)",
        "silu_glu_clamp(limit=x)",
        "silu(",
    ],
)
def test_bad_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="activation"):
        parse_activation(name)


def test_gate_must_match_the_kind() -> None:
    with pytest.raises(InternalError, match="needs a gate"):
        apply_activation("silu_glu", None, torch.zeros(2))
    with pytest.raises(InternalError, match="has no gate"):
        apply_activation("relu2", torch.zeros(2), torch.zeros(2))
