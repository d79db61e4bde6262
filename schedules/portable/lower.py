"""Replace operators by calls of the portable kernels.

Each function takes the builder of the pass that rewrites a function, the operator's call (or its parts) and
the target, and returns the expression that takes the call's place. Equal kernels become one PrimFunc.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from moqc.errors import TargetError
from moqc.ir.ops import PROJECTIONS, attributes, describe, operands
from moqc.quant.formats import Format
from moqc.schedules.portable import attention
from moqc.schedules.portable.dense import dense_linear_function, rms_norm_function, top_k_function
from moqc.schedules.portable.experts import ExpertsShape, experts_function
from moqc.schedules.portable.linear import LinearShape, embedding_function, linear_function
from moqc.schedules.read_experts import class_operands, read_experts, rotated_blocks
from moqc.targets import Target

WORDS = "moqc.words"
"""Packed function that stands for parameters one after the other in one buffer of 32-bit words. Nothing
implements it: whoever loads the weights puts them there."""
_PACKED = ("codes", "scales", "zeros")


def lower_mixed_experts(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.mixed_experts``: one function, whatever the number of tokens."""
    named, attrs = operands(call), attributes(call)
    _check_float(call, attrs, target)
    if "hidden" in attrs:
        raise TargetError(f"{describe(call)}: {target.name} has no protected channels: no protect-channels")
    x, ids = named["x"].ty, named["ids"].ty
    shape = read_experts(call, ExpertsShape, rotated=rotated_blocks(call))
    arguments = [named[name] for name in ("x", "ids", "weights", "table")]
    counts: list[Any] = []
    for projection in PROJECTIONS:
        tensors = class_operands(call, projection)
        if tensors:
            arguments.append(_words(bb, tensors))
            number = len(getattr(shape, projection))
            counts += [named[f"{projection}.{i}.codes"].ty.shape[0] for i in range(number)]
    arguments += [named[name] for name in shape.biases]
    arguments += [relax.prim_value(count) for count in counts]
    tokens, pairs = x.shape[0], x.shape[0] * shape.top_k
    types = [
        relax.TensorType([shape.routing(pairs)], "int32"),
        relax.TensorType([pairs, shape.intermediate], "float32"),
        relax.TensorType([pairs, shape.hidden], "float32"),
        relax.TensorType([tokens, shape.hidden], "float32"),
    ]
    function = bb.add_func(experts_function(shape, str(ids.dtype)), "moqc_experts")
    results = bb.emit(relax.call_tir(function, arguments, types))
    return relax.TupleGetItem(results, 3)


def lower_linear(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.linear``."""
    named, attrs = operands(call), attributes(call)
    _check_float(call, attrs, target)
    *lead, columns = list(named["x"].ty.shape)
    shape = LinearShape(Format.parse(attrs["format"]), attrs["rows"], int(columns), "bias" in named)
    arguments = [_flat(bb, named["x"], 1), _words(bb, [named[name] for name in _PACKED if name in named])]
    arguments += [named["bias"]] if shape.bias else []
    function = bb.add_func(linear_function(shape), "moqc_linear")
    flat = relax.TensorType([_product(lead), shape.rows], "float32")
    result = bb.emit(relax.call_tir(function, arguments, flat))
    return relax.op.reshape(result, [*lead, shape.rows])


def lower_embedding(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.moqc.embedding``."""
    named, attrs = operands(call), attributes(call)
    ids, rows = named["ids"].ty, 16 * int(named["codes"].ty.shape[0])
    kernel = embedding_function(
        Format.parse(attrs["format"]), rows, attrs["columns"], dtype=str(ids.dtype), lead=len(ids.shape)
    )
    words = _words(bb, [named[name] for name in _PACKED if name in named])
    return relax.call_tir(bb.add_func(kernel, "moqc_embedding"), [named["ids"], words], call.ty)


def lower_attention(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.moqc.cached_attention``; the result is out and both caches."""
    named, attrs = operands(call), attributes(call)
    slots, key_heads, context = (int(extent) for extent in list(named["k_cache"].ty.shape)[:3])
    shape = attention.AttentionShape(
        heads=int(named["q"].ty.shape[1]),
        key_heads=key_heads,
        key_width=int(named["q"].ty.shape[3]),
        value_width=int(named["v"].ty.shape[3]),
        scale=float(attrs["scale"]),
        slots=slots,
        context=context,
        window=attrs["window"],
        chunk=attrs.get("chunk", 0),
        softcap=float(attrs["softcap"]),
        sinks="sinks" in named,
    )
    kernel = attention.attention_function(shape, str(named["positions"].ty.dtype))
    places = ["q", "k", "v", "positions", "k_cache", "v_cache", *(["sinks"] if shape.sinks else [])]
    in_place = [-1, places.index("k_cache"), places.index("v_cache")]
    arguments = relax.Tuple([named[name] for name in places])
    function = bb.add_func(kernel, "moqc_attention")
    return relax.op.call_tir_inplace(function, arguments, in_place, list(call.ty.fields))


def refuse(reason: str) -> Any:
    """The lowering of an operator without a kernel: TargetError with the `reason`."""

    def lower(_bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
        raise TargetError(f"{describe(call)}: {reason} for target {target.name}")

    return lower


def lower_dense_linear(
    bb: relax.BlockBuilder, x: relax.Expr, weight: relax.Expr, _target: Target
) -> relax.Expr:
    """``matmul(x, permute_dims(weight))`` with float32 x [..., K] and weight [N, K]."""
    rows, columns = (int(extent) for extent in weight.ty.shape)
    lead = list(x.ty.shape)[:-1]
    function = bb.add_func(dense_linear_function(rows, columns), "moqc_dense_linear")
    flat = relax.TensorType([_product(lead), rows], "float32")
    result = bb.emit(relax.call_tir(function, [_flat(bb, x, 1), weight], flat))
    return relax.op.reshape(result, [*lead, rows])


def lower_rms_norm(
    bb: relax.BlockBuilder, x: relax.Expr, weight: relax.Expr | None, epsilon: float, _target: Target
) -> relax.Expr:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis of float32 x, of constant extent."""
    *lead, columns = list(x.ty.shape)
    kernel = rms_norm_function(int(columns), epsilon, weighted=weight is not None, lead=len(lead))
    function = bb.add_func(kernel, "moqc_rms_norm")
    return relax.call_tir(function, [x] if weight is None else [x, weight], x.ty)


def lower_topk(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.topk`` of values and indices: the largest of the last axis of float32 x, of constant extent."""
    *lead, columns = list(call.args[0].ty.shape)
    values, indices = call.ty.fields
    kernel = top_k_function(int(columns), int(values.shape[-1]), str(indices.dtype), lead=len(lead))
    return relax.call_tir(bb.add_func(kernel, "moqc_top_k"), [call.args[0]], list(call.ty.fields))


def _check_float(call: relax.Call, attrs: dict[str, Any], target: Target) -> None:
    if attrs["activations"] != "float":
        raise TargetError(f"{describe(call)}: the kernels of {target.name} take float activations, not int8")


def _words(bb: relax.BlockBuilder, tensors: Sequence[relax.Expr]) -> relax.Expr:
    """Weights in one buffer of words."""
    sizes = [
        prod(int(extent) for extent in tensor.ty.shape) * np.dtype(str(tensor.ty.dtype)).itemsize
        for tensor in tensors
    ]
    words = relax.TensorType([sum(sizes) // 4], "uint32")
    return bb.emit(relax.op.call_pure_packed(WORDS, *tensors, ty_args=words))


def _product(extents: Sequence[Any]) -> Any:
    total = extents[0]
    for extent in extents[1:]:
        total = total * extent
    return total


def _flat(bb: relax.BlockBuilder, x: relax.Expr, kept: int) -> relax.Expr:
    """`x` with all axes but the last `kept` in one."""
    extents = list(x.ty.shape)
    return bb.emit(relax.op.reshape(x, [_product(extents[:-kept]), *extents[-kept:]]))
