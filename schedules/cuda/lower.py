"""Replace operators by calls of the CUDA kernels.

Each function takes the builder of the pass that rewrites a function, the operator's call (or its parts) and
the target, and returns the expression that takes the call's place. Equal kernels become one PrimFunc. Most
kernels leave something for each other in a workspace, an output that nobody reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx

from moqc.errors import TargetError
from moqc.ir.ops import attributes, describe, operands
from moqc.quant.formats import Format
from moqc.schedules.cuda import attention, layer, linear, records
from moqc.schedules.cuda.dense import (
    dense_linear_function,
    embedding_function,
    rms_norm_function,
    top_k_function,
)
from moqc.schedules.cuda.plan import ExpertsShape
from moqc.schedules.cuda.prune import prune_function
from moqc.schedules.cuda.workspace import workspace_bytes
from moqc.schedules.pruning import PruneShape
from moqc.schedules.read_experts import read_experts, rotated_blocks
from moqc.targets import Target


def lower_mixed_experts(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.mixed_experts``: one function, whatever the number of tokens."""
    named, attrs = operands(call), attributes(call)
    if attrs["activations"] != "float":
        raise TargetError(f"{describe(call)}: the CUDA kernels take float activations, not int8")
    if rotated_blocks(call):
        raise TargetError(f"{describe(call)}: no CUDA kernel rotates: quantize-experts{{rotate=false}}")
    if "hidden" in attrs:
        raise TargetError(f"{describe(call)}: no CUDA kernel has protected channels: no protect-channels")
    x, shape = named["x"].ty, read_experts(call, ExpertsShape)
    options: dict[str, Any] = {"id_dtype": str(named["ids"].ty.dtype), "grouped": layer.grouped_from(shape)}
    options |= {"warp_groups": target.warp_groups, "shared": int(target.tvm["max_shared_memory_per_block"])}
    options["records"] = records.sources(target)
    function = layer.experts_function(shape, x_dtype="float32", **options)
    size = workspace_bytes(shape, x.shape[0])
    return _with_workspace(bb, function, "experts", list(named.values()), size, x)


def lower_linear(
    bb: relax.BlockBuilder, call: relax.Call, _target: Target, residual: relax.Expr | None = None
) -> relax.Expr:
    """``R.moqc.linear``, plus `residual` of the result's shape."""
    return lower_linears(bb, [call], residual)[0]


def lower_linears(
    bb: relax.BlockBuilder, calls: Sequence[relax.Call], residual: relax.Expr | None = None
) -> list[relax.Expr]:
    """``R.moqc.linear`` calls with the same x in one launch; `residual` goes with a single one."""
    x = operands(calls[0])["x"]
    *lead, columns = list(x.ty.shape)
    shapes, arguments, types = [], [x], []
    for call in calls:
        named, attrs = operands(call), attributes(call)
        added = {"bias": "bias" in named, "residual": residual is not None}
        format = Format.parse(attrs["format"])
        shapes.append(linear.LinearShape(format, attrs["rows"], int(columns), len(lead), **added))
        arguments += [named[name] for name in ("codes", "scales", "zeros", "bias") if name in named]
        types.append(relax.TensorType([*lead, attrs["rows"]], "float32"))
    if residual is not None:
        arguments.append(residual)
    size = linear.workspace_bytes(int(columns), linear.product(lead))
    function = bb.add_func(linear.linear_function(shapes), "moqc_linear")
    both = bb.emit(relax.call_tir(function, arguments, [relax.TensorType([size], "uint8"), *types]))
    return [relax.TupleGetItem(both, number + 1) for number in range(len(calls))]


def lower_embedding(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.moqc.embedding``."""
    named, attrs = operands(call), attributes(call)
    ids = named["ids"].ty
    format = Format.parse(attrs["format"])
    kernel = embedding_function(format, attrs["columns"], dtype=str(ids.dtype), lead=len(ids.shape))
    function = bb.add_func(kernel, "moqc_embedding")
    return relax.call_tir(function, list(named.values()), call.ty)


def lower_attention(
    bb: relax.BlockBuilder,
    call: relax.Call,
    _target: Target,
    inputs: Sequence[relax.Expr] | None = None,
    norms: Sequence[relax.Expr] = (),
    epsilon: float = 0.0,
    rotation: Sequence[relax.Expr] = (),
) -> relax.Expr:
    """``R.moqc.cached_attention``; the result is out and both caches.

    `inputs` are q, k and v as ``[B, S, heads * width]`` before norm, rotation and transposition, in place of
    the call's own; `norms` the weights of q and k; `rotation` cosines and sines ``[B, S, rotary]``.
    """
    named, attrs = operands(call), attributes(call)
    if "chunk" in attrs:
        raise TargetError(f"{describe(call)}: there is no CUDA kernel of attention in chunks")
    k_cache, q = named["k_cache"].ty, named["q"].ty
    slots, key_heads, context = (int(extent) for extent in list(k_cache.shape)[:3])
    shape = attention.AttentionShape(
        heads=int(q.shape[1]),
        key_heads=key_heads,
        key_width=int(q.shape[3]),
        value_width=int(named["v"].ty.shape[3]),
        scale=float(attrs["scale"]),
        window=attrs["window"],
        softcap=float(attrs["softcap"]),
        sinks="sinks" in named,
        normed=bool(norms),
        epsilon=epsilon,
        rotary=int(rotation[0].ty.shape[-1]) if rotation else 0,
        head_first=inputs is None,
    )
    arguments = list(inputs or (named[name] for name in ("q", "k", "v")))
    arguments += [named["positions"], *([named["sinks"]] if shape.sinks else []), *norms, *rotation]
    in_place = [-1, -1, len(arguments), len(arguments) + 1]
    arguments += [named["k_cache"], named["v_cache"]]
    size = attention.workspace_bytes(shape, q.shape[0], q.shape[2], context)
    out, *caches = call.ty.fields
    function = bb.add_func(attention.attention_function(shape, slots, context), "moqc_attention")
    types = [relax.TensorType([size], "uint8"), out, *caches]
    result = bb.emit(relax.op.call_tir_inplace(function, relax.Tuple(arguments), in_place, types))
    return relax.Tuple([bb.emit(relax.TupleGetItem(result, number)) for number in (1, 2, 3)])


def lower_uncached_attention(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.attention`` has no kernel: models for this target have a cache."""
    raise TargetError(f"{describe(call)}: run plan-cache before legalize for target {target.name}")


def lower_dense_experts(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.experts`` has no kernel: experts are quantized for this target."""
    raise TargetError(f"{describe(call)}: run quantize-experts before legalize for target {target.name}")


def lower_prune_routing(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.moqc.prune_routing``: one kernel."""
    function = bb.add_func(prune_function(PruneShape.of(call)), "moqc_prune_routing")
    return relax.call_tir(function, list(operands(call).values()), list(call.ty.fields))


def lower_dense_linear(
    bb: relax.BlockBuilder, x: relax.Expr, weight: relax.Expr, _target: Target
) -> relax.Expr:
    """``matmul(x, permute_dims(weight))`` with float32 x [..., K] and weight [N, K]."""
    rows, columns = (int(extent) for extent in weight.ty.shape)
    lead = list(x.ty.shape)[:-1]
    function = bb.add_func(dense_linear_function(rows, columns, lead=len(lead)), "moqc_dense_linear")
    return relax.call_tir(function, [x, weight], relax.TensorType([*lead, rows], "float32"))


def lower_rms_norm(
    bb: relax.BlockBuilder, x: relax.Expr, weight: relax.Expr | None, epsilon: float, _target: Target
) -> relax.Expr:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis of float32 x, of constant extent."""
    *lead, columns = list(x.ty.shape)
    kernel = rms_norm_function(int(columns), epsilon, weighted=weight is not None, lead=len(lead))
    function = bb.add_func(kernel, "moqc_rms_norm")
    return relax.call_tir(function, [x] if weight is None else [x, weight], x.ty)


def lower_added_norm(
    bb: relax.BlockBuilder, x: relax.Expr, added: relax.Expr, weight: relax.Expr | None, epsilon: float
) -> relax.Expr:
    """``x + added`` and its RMS norm, in a tuple."""
    *lead, columns = list(x.ty.shape)
    kernel = rms_norm_function(int(columns), epsilon, weighted=weight is not None, lead=len(lead), added=True)
    arguments = [x, added] if weight is None else [x, added, weight]
    return relax.call_tir(bb.add_func(kernel, "moqc_rms_norm"), arguments, [x.ty, x.ty])


def lower_topk(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.topk`` of values and indices: the largest of the last axis of float32 x, of constant extent."""
    types = list(call.ty.fields)
    return lower_router(bb, call.args[0], types, softmax=False, normalize=False)


def lower_router(
    bb: relax.BlockBuilder, x: relax.Expr, types: Sequence[Any], *, softmax: bool, normalize: bool
) -> relax.Expr:
    """The top-k of float32 x, or of its softmax, divided by their sum; `types` of values and indices."""
    *lead, columns = list(x.ty.shape)
    count, dtype = int(types[0].shape[-1]), str(types[1].dtype)
    kernel = top_k_function(int(columns), count, dtype, lead=len(lead), softmax=softmax, normalize=normalize)
    return relax.call_tir(bb.add_func(kernel, "moqc_top_k"), [x], list(types))


def _with_workspace(
    bb: relax.BlockBuilder,
    kernel: tirx.PrimFunc,
    name: str,
    arguments: Sequence[relax.Expr],
    size: Any,
    result: relax.TensorType,
) -> relax.Expr:
    """A call whose outputs are a workspace of `size` bytes, which is dropped, and the result."""
    function = bb.add_func(kernel, f"moqc_{name}")
    types = [relax.TensorType([size], "uint8"), result]
    both = bb.emit(relax.call_tir(function, list(arguments), types))
    return relax.TupleGetItem(both, 1)
