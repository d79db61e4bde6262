import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from moqc.errors import ModelError
from moqc.frontend.gates import classify_gate


def experts(
    gate: Callable[[torch.Tensor], torch.Tensor], *, interleaved: bool = False, **constants: Any
) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        has_gate=True, is_concatenated=not interleaved, _apply_gate=gate, **constants
    )


def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = x.chunk(2, -1)
    return first, second


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (functional.silu, "silu_glu"),
        (functional.gelu, "gelu_glu"),
        (lambda x: functional.gelu(x, approximate="tanh"), "gelu_tanh_glu"),
        (functional.relu, "relu_glu"),
    ],
)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gated(function: Callable[[torch.Tensor], torch.Tensor], name: str, interleaved: bool) -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = (x[..., ::2], x[..., 1::2]) if interleaved else halves(x)
        return function(first) * second

    assert classify_gate(experts(gate, interleaved=interleaved), "site") == name


@pytest.mark.parametrize(
    ("function", "name"),
    [(functional.silu, "silu"), (functional.gelu, "gelu"), (lambda x: functional.relu(x) ** 2, "relu2")],
)
def test_plain(function: Callable[[torch.Tensor], torch.Tensor], name: str) -> None:
    module = types.SimpleNamespace(has_gate=False, is_concatenated=True, act_fn=function)
    assert classify_gate(module, "site") == name


def test_clamps_are_told_apart() -> None:
    def before(x: torch.Tensor) -> torch.Tensor:
        gate, up = halves(x)
        return functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)

    def after(x: torch.Tensor) -> torch.Tensor:
        gate, up = halves(x)
        return functional.silu(gate).clamp(max=10) * up.clamp(-10, 10)

    def scaled(x: torch.Tensor) -> torch.Tensor:
        gate, up = halves(x)
        gate = gate.clamp(max=10)
        return gate * torch.sigmoid(1.7 * gate) * (up.clamp(-10, 10) + 1)

    assert classify_gate(experts(before, limit=10), "site") == "silu_glu_clamp(limit=10.0)"
    assert classify_gate(experts(after, swiglu_limit=10.0), "site") == "silu_glu_postclamp(limit=10.0)"
    expected = "oai_swiglu(alpha=1.7,limit=10.0)"
    assert classify_gate(experts(scaled, limit=10.0, alpha=1.7), "site") == expected


def test_float32_inside_is_close_enough() -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = halves(x.float())
        return functional.silu(first) * second

    assert classify_gate(experts(gate), "site") == "silu_glu"


def test_unknown_gate_is_refused() -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = halves(x)
        return torch.sin(first) * second

    with pytest.raises(ModelError, match=r"layers\.3\.experts: the gate function .* none that moqc knows"):
        classify_gate(experts(gate), "layers.3.experts")


def test_an_unknown_gate_of_a_class_is_named() -> None:
    module = experts(lambda x: halves(x)[0].sin())
    module.act_fn = torch.nn.Softsign()
    with pytest.raises(ModelError, match=r"the gate function of \w+ \(Softsign\) is none that moqc knows"):
        classify_gate(module, "site")


def test_swapped_halves_are_not_the_same_gate() -> None:
    def gate(x: torch.Tensor) -> torch.Tensor:
        first, second = halves(x)
        return functional.silu(second) * first

    with pytest.raises(ModelError):
        classify_gate(experts(gate), "site")
