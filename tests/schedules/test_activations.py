"""TIR activations against torch, over the range where they change and far beyond."""

import numpy as np
import pytest
import torch
import tvm
from tvm.tirx.script import builder as T

from moqc.errors import InternalError
from moqc.quant.activations import ACTIVATIONS, CONSTANTS, apply_activation, parse_activation
from moqc.schedules import activations
from moqc.schedules.cpu.emit import kernel, load, loop, store
from moqc.targets import TARGETS

CONSTANT_VALUES = {"alpha": "1.702", "limit": "3.0"}
NAMES = [
    f"{kind}({','.join(f'{key}={CONSTANT_VALUES[key]}' for key in CONSTANTS[kind])})"
    if kind in CONSTANTS
    else kind
    for kind in ACTIVATIONS
]
COUNT = 4096


def compile_expressions(expressions, lanes):
    """name -> function of (gate, up) tensors and an output, with `lanes` elements at a time."""
    functions = {}
    for number, expression in enumerate(expressions):
        with kernel("activation") as k:
            gate, up, out = (k.parameter(name, [COUNT], "float32") for name in ("gate", "up", "out"))
            kind = "float32" if lanes == 1 else f"float32x{lanes}"
            with loop(0, COUNT // lanes) as i:
                vectors = [T.bind(load(buffer, [i * lanes], kind)) for buffer in (gate, up)]
                store(out, [i * lanes], expression(*vectors))
        functions[f"f{number}"] = k.finish().with_attr("global_symbol", f"f{number}")
    built = tvm.compile(tvm.IRModule(functions), target=TARGETS["x86-64-v4"].tvm)
    return [built[name] for name in functions]


def run(function, gate, up):
    out = tvm.runtime.empty((COUNT,), "float32")
    function(tvm.runtime.tensor(gate), tvm.runtime.tensor(up), out)
    return out.numpy()


@pytest.mark.parametrize("lanes", [1, 16])
def test_every_activation_equals_torch(lanes):
    def expression(name):
        gated = parse_activation(name).has_gate
        return lambda gate, up: activations.activation_expr(name, gate if gated else None, up)

    random = np.random.default_rng(0)
    gate, up = ((random.standard_normal(COUNT) * scale).astype(np.float32) for scale in (6, 5))
    gate[:4], up[:4] = [0, -200, 200, 30], [200, 3, 1, -200]
    functions = compile_expressions([expression(name) for name in NAMES], lanes)
    for name, function in zip(NAMES, functions, strict=True):
        gate_or_none = torch.from_numpy(gate) if parse_activation(name).has_gate else None
        expected = apply_activation(name, gate_or_none, torch.from_numpy(up)).numpy()
        # 1 + erf(x) cancels for negative x: the error is relative to gate * up, up to 400 here.
        np.testing.assert_allclose(run(function, gate, up), expected, rtol=2e-6, atol=2e-5, err_msg=name)


def test_functions_are_accurate_to_a_few_units_in_the_last_place():
    x = np.linspace(-12, 12, COUNT, dtype=np.float32)
    wide = np.linspace(-87, 88, COUNT, dtype=np.float32)
    functions = compile_expressions(
        [lambda g, _, f=f: f(g) for f in (activations.exp, activations.tanh, activations.erf)], 8
    )
    exact = torch.from_numpy(x).double()
    pairs = [(wide, np.exp(wide.astype(np.float64))), (x, exact.tanh().numpy()), (x, exact.erf().numpy())]
    for function, (points, expected) in zip(functions, pairs, strict=True):
        np.testing.assert_allclose(run(function, points, points), expected, rtol=4e-7)


def test_a_missing_gate_is_an_error():
    with pytest.raises(InternalError, match="needs a gate"):
        activations.activation_expr("silu_glu", None, T.float32(1))
