from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tvm
from tvm import relax

from moqc.ir import ops
from moqc.quant import reference
from moqc.schedules.cpu.lower import lower_mixed_experts

EXPERTS, TOP_K = 6, 2


@dataclass(frozen=True)
class Layer:
    """One configuration of the operator; experts take the classes of a projection in turn."""

    hidden: int
    intermediate: int
    classes: dict[str, tuple[str, ...]]
    activation: str
    mode: str
    biases: tuple[str, ...] = ()


LAYERS = {
    # Ragged everywhere, an odd number of row blocks, every projection in several classes.
    "mixed": Layer(
        100,
        40,
        {
            "gate": ("int3-g64", "tcq2-g32"),
            "up": ("int4-g128-sym", "int1-g64", "tcq3-g32"),
            "down": ("int3-g32-s8", "int8-g64", "tcq1-g32"),
        },
        "silu_glu|hadamard32",
        "int8",
        ("gate_bias", "up_bias", "down_bias"),
    ),
    # Five row blocks, more than a chunk.
    "exact": Layer(
        80,
        160,
        {"gate": ("int3-g64", "int4-g64"), "up": ("int3-g64",), "down": ("int2-g64", "int4-g32-sym")},
        "oai_swiglu(alpha=1.702,limit=7.0)",
        "float",
        ("up_bias",),
    ),
    "rotated": Layer(
        64,
        72,
        {"gate": ("int4-g64",), "up": ("int4-g64",), "down": ("int2-g64",)},
        "gelu_glu|hadamard32",
        "float",
    ),
    "plain": Layer(64, 32, {"up": ("int2-g64-sym",), "down": ("int4-g64",)}, "relu2", "int8"),
    # Gate and up are multiplied with signed codes, down with wide ones; batches of columns with one scale.
    "groups of 128": Layer(
        712,
        48,
        {
            "gate": ("int4-g128-sym-s8",),
            "up": ("int3-g128-sym", "tcq2-g128", "int8-g128-sym"),
            "down": ("int8-g128",),
        },
        "silu_glu",
        "int8",
    ),
    # Several batches of columns, the last one smaller and ragged.
    "long": Layer(
        712,
        48,
        {"gate": ("int4-g64",), "up": ("int3-g128", "int2-g64"), "down": ("int4-g64",)},
        "silu_glu",
        "int8",
    ),
}


def _rows_and_columns(layer: Layer, projection: str) -> tuple[int, int]:
    shape = (layer.intermediate, layer.hidden)
    return shape[::-1] if projection == "down" else shape


def _weights(layer: Layer, toolbox) -> tuple[dict[str, torch.Tensor], dict[str, np.ndarray]]:
    """Dequantized matrices by projection, and the packed operands."""
    table = np.zeros((3, EXPERTS, 2), np.int32)
    operands, matrices = {"table": table}, {}
    for projection, formats in layer.classes.items():
        rows, columns = _rows_and_columns(layer, projection)
        dense = torch.zeros(EXPERTS, rows, columns)
        for number, fmt in enumerate(formats):
            members = list(range(number, EXPERTS, len(formats)))
            quantized = toolbox.quantized(fmt, len(members), rows, columns)
            dense[members] = quantized.dequantize()
            operands |= toolbox.packed(quantized, f"{projection}.{number}.")
            for index, expert in enumerate(members):
                table[ops.PROJECTIONS.index(projection), expert] = number, index
        matrices[projection] = dense
    for name in layer.biases:
        rows, _ = _rows_and_columns(layer, name.removesuffix("_bias"))
        matrices[name] = toolbox.normal(EXPERTS, rows)
        operands[name] = matrices[name].numpy()
    return matrices, operands


@pytest.fixture(scope="module")
def layers(functions, toolbox):
    weights = {}
    for name, layer in LAYERS.items():
        matrices, operands = _weights(layer, toolbox)
        tokens = tvm.tirx.Var("t", "int64")
        inputs = [
            relax.Var("x", relax.TensorType([tokens, layer.hidden], "float32")),
            relax.Var("ids", relax.TensorType([tokens, TOP_K], "int64")),
            relax.Var("weights", relax.TensorType([tokens, TOP_K], "float32")),
        ]

        def call(*arguments, layer=layer, names=tuple(operands)):
            return ops.mixed_experts(
                *arguments,
                site="s",
                activation=layer.activation,
                activations=layer.mode,
                operands=list(names),
                classes=[f"{p}:{fmt}" for p, formats in layer.classes.items() for fmt in formats],
                intermediate=layer.intermediate,
            )

        functions.add(name, inputs, operands, call, lower_mixed_experts)
        weights[name] = (matrices, operands)
    return functions, weights


def _compare(layers, name: str, ids: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """The kernels' result and the reference's; the inputs are the same whatever other tests ran before."""
    functions, weights = layers
    layer, (matrices, operands) = LAYERS[name], weights[name]
    generator = torch.Generator().manual_seed(len(ids))
    x = torch.randn(len(ids), layer.hidden, generator=generator)
    shares = torch.rand(ids.shape, generator=generator)
    actual = functions.run(name, x.numpy(), ids.numpy(), shares.numpy(), *operands.values())
    expected = reference.experts(
        x,
        ids,
        shares,
        matrices.get("gate"),
        matrices["up"],
        matrices["down"],
        activation=layer.activation,
        activations=layer.mode,
        **{bias: matrices[bias] for bias in layer.biases},
    )
    return actual, expected


def _random_ids(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(tokens)])


@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_reference(layers, relative_error, name, tokens):
    actual, expected = _compare(layers, name, _random_ids(tokens))
    # An int8 code of the hidden tensor beyond a tie costs up to 1e-3; the small layers have none.
    allowed = {"float": 2e-6, "int8": 1e-3 if name == "long" else 1e-4}
    assert relative_error(actual, expected) < allowed[LAYERS[name].mode]


@pytest.mark.parametrize("name", ["mixed", "exact"])
def test_all_tokens_on_one_expert(layers, relative_error, name):
    ids = torch.tensor([[3, 3]] * 9)
    actual, expected = _compare(layers, name, ids)
    assert relative_error(actual, expected) < 1e-4


def test_more_tokens_than_are_multiplied_at_once(layers, relative_error):
    ids = torch.tensor([[1, 4]]).repeat(150, 1)
    ids[70:, 1] = -1
    actual, expected = _compare(layers, "long", ids)
    assert relative_error(actual, expected) < 1e-3


def test_no_tokens(layers):
    actual, _ = _compare(layers, "mixed", torch.zeros(0, TOP_K, dtype=torch.int64))
    assert actual.shape == (0, LAYERS["mixed"].hidden)


def test_drops_unknown_experts(layers, relative_error):
    ids = torch.tensor([[0, -1], [EXPERTS, 2], [1 << 40, -(1 << 40)], [1, 4]])
    actual, expected = _compare(layers, "mixed", ids)
    assert relative_error(actual, expected) < 1e-4
    assert not actual[2].any()
