"""Replace moqc's packed operators by calls of the CPU kernels.

Each function takes the builder of the pass that rewrites a function, the operator's call and the target; it
emits the calls of the intermediate tensors and returns the last one. Equal kernels become one PrimFunc of
the module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tvm import relax, tirx

from moqc.ir.ops import attributes, operands
from moqc.quant.formats import Format
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.families import FAMILIES
from moqc.schedules.cpu.packed_embedding import embedding_kernel
from moqc.schedules.cpu.packed_experts import ExpertsShape, down_kernel, gate_up_kernel
from moqc.schedules.cpu.packed_linear import linear_kernel
from moqc.schedules.cpu.plan import KERNELS, Plans, find_plans
from moqc.schedules.cpu.quantize_activations import activations_kernel
from moqc.schedules.cpu.route import lower_route
from moqc.schedules.cpu.tiles import Activations
from moqc.schedules.read_experts import class_operands, read_experts, rotated_blocks
from moqc.targets import Target

Types = Sequence[tuple[Sequence[Any], str]]
"""Shape and dtype of each output."""


def lower_mixed_experts(
    bb: relax.BlockBuilder, call: relax.Call, target: Target, plans: Mapping[str, Plans] | None = None
) -> relax.Expr:
    """``R.moqc.mixed_experts``: route, prepare x, gate and up, prepare the hidden tensor, down.

    `plans` of gate_up and down, in place of those recorded for the target or the rules'.
    """
    family, named = FAMILIES[target.dot], operands(call)
    x, ids, weights = (named[name] for name in ("x", "ids", "weights"))
    shape = read_experts(
        call,
        ExpertsShape,
        inputs=int(x.ty.shape[1]),
        mode=attributes(call)["activations"],
        rotated=rotated_blocks(call),
    )
    plans = plans or {name: find_plans(target, name, shape.sizes, shape.formats(name)) for name in KERNELS}
    tokens, pairs = x.ty.shape[0], x.ty.shape[0] * shape.top_k
    order, starts, active = lower_route(bb, ids, shape.experts)

    gather = activations_kernel(family, shape.inputs, mode=shape.mode, top_k=shape.top_k)
    inputs = _emit(
        bb, gather, "gather", [x, order], _activation_types(family, pairs, shape.inputs, shape.mode)
    )
    first = [*class_operands(call, "gate"), *class_operands(call, "up")]
    first += [named[name] for name in ("gate_bias", "up_bias") if name in shape.biases]
    routing = [starts, active, named["table"]]
    (hidden,) = _emit(
        bb,
        gate_up_kernel(family, shape, plans["gate_up"]),
        "gate_up",
        [*inputs, *routing, *first],
        [([pairs, shape.padded_intermediate], "float32")],
    )

    if shape.mode == "int8" or shape.rotated:
        prepare = activations_kernel(
            family, shape.padded_intermediate, mode=shape.mode, rotated=shape.rotated
        )
        types = _activation_types(family, pairs, shape.intermediate, shape.mode)
        prepared = _emit(bb, prepare, "activations", [hidden], types)
    else:
        prepared = [hidden]
    last = class_operands(call, "down")
    last += [named["down_bias"]] if "down_bias" in shape.biases else []
    arguments = [*prepared, *routing, order, weights, *last]
    down = down_kernel(family, shape, plans["down"])
    return _call(bb, down, "down", arguments, [([tokens, shape.hidden], "float32")])


def lower_linear(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.linear``: prepare x, multiply."""
    family, named, attrs = FAMILIES[target.dot], operands(call), attributes(call)
    x, mode, rows = named["x"], attrs["activations"], attrs["rows"]
    *lead, columns = list(x.ty.shape)
    tokens: Any = 1
    for extent in lead:
        tokens = tokens * extent
    prepare = activations_kernel(family, int(columns), mode=mode, lead=len(lead))
    inputs = _emit(bb, prepare, "activations", [x], _activation_types(family, tokens, int(columns), mode))
    multiply = linear_kernel(
        family,
        Format.parse(attrs["format"]),
        rows,
        int(columns),
        mode=mode,
        bias="bias" in named,
        lead=len(lead),
    )
    tensors = [named[name] for name in ("codes", "scales", "zeros", "bias") if name in named]
    return _call(bb, multiply, "linear", [*inputs, *tensors], [([*lead, rows], "float32")])


def lower_embedding(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.embedding``: gather and dequantize."""
    named, attrs = operands(call), attributes(call)
    ids, columns = named["ids"], attrs["columns"]
    lead = list(ids.ty.shape)
    gather = embedding_kernel(Format.parse(attrs["format"]), columns, dtype=str(ids.ty.dtype), lead=len(lead))
    tensors = [named[name] for name in ("codes", "scales", "zeros") if name in named]
    return _call(bb, gather, "embedding", [ids, *tensors], [([*lead, columns], "float32")])


def _activation_types(family: DotFamily, rows: Any, columns: int, mode: str) -> Types:
    """Outputs of `activations_kernel`, which have `DotFamily.spare_rows` more."""
    if mode == "int8":
        rows = rows + family.spare_rows
    return [([rows, width], dtype) for _, width, dtype in Activations.layout(mode, columns)]


def _call(
    bb: relax.BlockBuilder, function: tirx.PrimFunc, name: str, arguments: Sequence[relax.Expr], types: Types
) -> relax.Call:
    outputs = [relax.TensorType(list(shape), dtype) for shape, dtype in types]
    target = bb.add_func(function, f"moqc_{name}")
    return relax.call_tir(target, list(arguments), outputs[0] if len(outputs) == 1 else outputs)


def _emit(
    bb: relax.BlockBuilder, function: tirx.PrimFunc, name: str, arguments: Sequence[relax.Expr], types: Types
) -> list[relax.Expr]:
    """Emit a kernel's call; its outputs as variables."""
    result = bb.emit(_call(bb, function, name, arguments, types))
    if len(types) == 1:
        return [result]
    return [bb.emit(relax.TupleGetItem(result, number)) for number in range(len(types))]
