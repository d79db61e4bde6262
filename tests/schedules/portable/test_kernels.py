"""The kernels for OpenCL (and WebGPU) against the reference, where there is an OpenCL device.

In float16 too where that device has it: PoCL 3.1 has not, Intel's runtime for CPUs has (docs/targets.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tvm import relax, tirx

from moqc.ir import ops
from moqc.ir.annotations import PARAMS
from moqc.launch_plan import plan_launches
from moqc.passes.base import PassContext
from moqc.passes.legalize import Legalize
from moqc.passes.narrow_integers import NarrowIntegers
from moqc.passes.schedule import Schedule
from moqc.quant import grid, reference
from moqc.quant.formats import Format
from moqc.quant.pack import pack
from moqc.quant.tensor import Quantized
from moqc.targets import find_target

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 6, 2, 80, 48
CLASSES = {"gate": ("int3-g64", "int1-g32"), "up": ("int4-g128-sym",), "down": ("int2-g32-s8", "int8-g64")}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}
"""Relative error by what the kernels multiply in."""


@pytest.fixture(scope="module", params=TOLERANCE)
def device(request):
    from opencl_device import require_device

    require_device()
    from moqc.runtime.opencl import OpenCl

    opened = OpenCl()
    if request.param == "float16" and opened.precision != "float16":
        pytest.skip(f"{opened.handle.name} has no cl_khr_fp16")
    opened.precision = request.param
    return opened


def _quantized(generator: torch.Generator, name: str, *shape: int) -> Quantized:
    fmt = Format.parse(name)
    groups = (*shape[:-1], fmt.groups(shape[-1]))
    codes = torch.randint(0, fmt.levels, shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(groups, generator=generator) * 0.02 + 0.001
    zeros = None
    if not fmt.symmetric:
        zeros = torch.randint(0, 256, groups, generator=generator, dtype=torch.uint8)
    return Quantized(fmt, codes, grid.rounded(scales, scales, fmt).scale.half(), zeros)


def _packed(quantized: Quantized, prefix: str = "") -> dict[str, np.ndarray]:
    packed = pack(quantized)
    arrays = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros}
    return {prefix + name: array for name, array in arrays.items() if array is not None}


def _function(
    device: Any, inputs: dict[str, Any], weights: dict[str, np.ndarray], call: Callable[..., relax.Call]
) -> Callable[..., np.ndarray]:
    """``call(*inputs, *weights)`` compiled for OpenCL, as a function of the inputs."""
    from moqc.runtime.opencl import LaunchedFunction

    parameters = [relax.Var(name, ty) for name, ty in inputs.items()]
    stored = [
        relax.Var(name.replace(".", "_"), relax.TensorType(array.shape, str(array.dtype)))
        for name, array in weights.items()
    ]
    builder = relax.BlockBuilder()
    attrs = {"tir_var_upper_bound": {"seq": 16}, "num_input": len(inputs)}
    with builder.function("main", [*parameters, *stored], attrs):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(call(*parameters, *stored)))
        builder.emit_func_output(result)
    mod, target = PARAMS.put(builder.get(), list(weights)), find_target("opencl")
    for each in (NarrowIntegers(), Legalize(), Schedule()):
        mod = each(mod, PassContext(target=target))
    launches = plan_launches(mod, target)
    main = LaunchedFunction(device, launches, launches.main)

    def run(*arguments: np.ndarray) -> np.ndarray:
        (output,) = main(*(device.put(argument) for argument in arguments), weights, ())
        return device.get(output, 0, int(np.prod(output.shape))).reshape(output.shape)

    return run


def _agree(device: Any, found: np.ndarray, expected: torch.Tensor) -> None:
    error = np.linalg.norm(found - expected.numpy()) / np.linalg.norm(expected.numpy())
    assert error < TOLERANCE[device.precision], error


@pytest.mark.parametrize("name", ["int1-g64", "int2-g32-sym", "int3-g64-s8", "int4-g128", "int8-g64-sym-s8"])
def test_linears(device, name):
    generator = torch.Generator().manual_seed(0)
    quantized = _quantized(generator, name, 40, 100)
    weights = _packed(quantized, "here.")
    names = [key.removeprefix("here.") for key in weights]

    def call(x: relax.Var, *operands: relax.Var) -> relax.Call:
        return ops.linear(
            x, *operands, rows=40, format=name, layout="interleaved16", operands=names,
            activations="float", site="here",
        )  # fmt: skip

    run = _function(
        device, {"x": relax.TensorType([tirx.Var("seq", "int64"), 100], "float32")}, weights, call
    )
    # Around 1e5 products and activations are beyond float16, around 1e-4 products are below its normal ones.
    for tokens, size in ((1, 1), (9, 1), (9, 1e5), (1, 1e4), (1, 1e-4)):
        x = size * torch.randn(tokens, 100, generator=generator)
        _agree(device, run(x.numpy()), x @ quantized.dequantize().float().T)


def test_experts_of_several_classes(device):
    generator = torch.Generator().manual_seed(0)
    table = np.zeros((3, EXPERTS, 2), np.int32)
    weights, matrices = {"table": table}, {}
    for projection, formats in CLASSES.items():
        rows, columns = (HIDDEN, INTERMEDIATE) if projection == "down" else (INTERMEDIATE, HIDDEN)
        matrices[projection] = torch.zeros(EXPERTS, rows, columns)
        for number, fmt in enumerate(formats):
            members = list(range(number, EXPERTS, len(formats)))
            quantized = _quantized(generator, fmt, len(members), rows, columns)
            matrices[projection][members] = quantized.dequantize().float()
            weights |= _packed(quantized, f"{projection}.{number}.")
            for index, expert in enumerate(members):
                table[ops.PROJECTIONS.index(projection), expert] = number, index

    def call(*arguments: relax.Var) -> relax.Call:
        return ops.mixed_experts(
            *arguments, site="s", activation="silu_glu", activations="float", operands=list(weights),
            classes=[f"{p}:{fmt}" for p, formats in CLASSES.items() for fmt in formats],
            intermediate=INTERMEDIATE,
        )  # fmt: skip

    tokens = tirx.Var("seq", "int64")
    inputs = {
        "x": relax.TensorType([tokens, HIDDEN], "float32"),
        "ids": relax.TensorType([tokens, TOP_K], "int64"),
        "weights": relax.TensorType([tokens, TOP_K], "float32"),
    }
    run = _function(device, inputs, weights, call)
    for count in (1, 12):
        x = torch.randn(count, HIDDEN, generator=generator)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(count)])
        shares = torch.rand(count, TOP_K, generator=generator)
        expected = reference.experts(
            x, ids, shares, *matrices.values(), activation="silu_glu", activations="float"
        )
        _agree(device, run(x.numpy(), ids.numpy(), shares.numpy()), expected)
