"""Experts with float32 weights, and float32 linears, against the reference in torch."""

import numpy as np
import pytest
import torch
import tvm
from tvm import relax, tirx

from moqc.ir import ops
from moqc.quant import reference
from moqc.schedules.cpu.dense_linear import dense_linear_kernel
from moqc.schedules.cpu.lower_dense import lower_experts
from moqc.targets import TARGETS

EXPERTS, TOP_K = 5, 2


def compile_experts(activation, hidden, intermediate, names, target):
    """A function x, ids, weights, *operands -> y, of the lowered operator."""
    shapes = {
        "gate": [EXPERTS, intermediate, hidden], "up": [EXPERTS, intermediate, hidden],
        "down": [EXPERTS, hidden, intermediate], "gate_bias": [EXPERTS, intermediate],
        "up_bias": [EXPERTS, intermediate], "down_bias": [EXPERTS, hidden],
    }  # fmt: skip
    builder, tokens = relax.BlockBuilder(), tirx.Var("tokens", "int64")
    x = relax.Var("x", relax.TensorType([tokens, hidden], "float32"))
    ids = relax.Var("ids", relax.TensorType([tokens, TOP_K], "int64"))
    weights = relax.Var("weights", relax.TensorType([tokens, TOP_K], "float32"))
    tensors = [relax.Var(name, relax.TensorType(shapes[name], "float32")) for name in names]
    with builder.function("main", [x, ids, weights, *tensors]):
        call = ops.experts(x, ids, weights, *tensors, site="experts", activation=activation, operands=names)
        call = builder.normalize(call)
        builder.emit_func_output(builder.emit(lower_experts(builder, call, TARGETS[target])))
    executable = tvm.compile(builder.finalize(), tvm.target.Target(TARGETS[target].tvm))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"], {name: shapes[name] for name in names}


@pytest.mark.parametrize(
    ("activation", "hidden", "intermediate", "biased", "target"),
    [
        ("silu_glu", 64, 96, False, "x86-64-v4"),
        ("oai_swiglu(alpha=1.702,limit=7.0)", 24, 40, True, "x86-64-v3"),
        ("relu2", 10, 7, True, "x86-64-v4"),
    ],
)
def test_experts_equal_the_reference(activation, hidden, intermediate, biased, target):
    gated = activation != "relu2"
    names = ["gate", "up", "down"] if gated else ["up", "down"]
    names += [f"{name}_bias" for name in list(names)] if biased else []
    run, shapes = compile_experts(activation, hidden, intermediate, names, target)
    torch.manual_seed(0)
    operands = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    for tokens in (1, 2, 37):
        x = torch.randn(tokens, hidden)
        # Every token takes expert 3, so that expert 0 or others stay without tokens.
        ids = torch.stack([torch.full((tokens,), 3), torch.randint(0, 3, (tokens,))], dim=1)
        weights = torch.rand(tokens, TOP_K)
        given = [tvm.runtime.tensor(t.numpy()) for t in (x, ids, weights, *operands.values())]
        expected = reference.experts(
            x, ids, weights, operands.get("gate"), operands["up"], operands["down"], activation=activation,
            **{name: tensor for name, tensor in operands.items() if name.endswith("_bias")},
        )  # fmt: skip
        np.testing.assert_allclose(run(*given).numpy(), expected.numpy(), atol=2e-5)


@pytest.mark.parametrize(("rows", "columns"), [(48, 64), (19, 32), (3, 5), (33, 24)])
def test_linear(rows, columns):
    kernel = dense_linear_kernel(rows, columns, lead=2, lanes=16).with_attr("global_symbol", "linear")
    run = tvm.compile(tvm.IRModule({"linear": kernel}), target=TARGETS["x86-64-v4"].tvm)["linear"]
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 3, columns)).astype(np.float32)
    weight = random.standard_normal((rows, columns)).astype(np.float32)
    out = tvm.runtime.empty((2, 3, rows), "float32")
    run(tvm.runtime.tensor(x), tvm.runtime.tensor(weight), out)
    np.testing.assert_allclose(out.numpy(), x @ weight.T, atol=1e-5)
