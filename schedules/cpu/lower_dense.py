"""Replace operators on float32 tensors by calls of CPU kernels: attention, float experts, float linears."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from moqc.ir.ops import EXPERT_OPERANDS, attributes, operands
from moqc.schedules.cpu.attention import attention_kernel
from moqc.schedules.cpu.attention_shape import AttentionShape
from moqc.schedules.cpu.dense_experts import DenseExpertsShape, dense_down_kernel, dense_up_kernel
from moqc.schedules.cpu.dense_linear import dense_linear_kernel
from moqc.schedules.cpu.rms_norm import rms_norm_kernel
from moqc.schedules.cpu.route import lower_route
from moqc.schedules.cpu.topk import topk_kernel
from moqc.targets import Target


def lower_attention(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.attention`` (the result is out) and ``R.moqc.cached_attention`` (out and both caches)."""
    named = operands(call)
    q, k_cache = named["q"].ty, named.get("k_cache")
    batch, tokens = (_extent(q.shape[axis], name) for axis, name in ((0, "batch"), (2, "tokens")))
    cache = None if k_cache is None else (int(k_cache.ty.shape[0]), int(k_cache.ty.shape[2]))
    function = bb.add_func(
        attention_kernel(_attention_shape(call, target), batch, tokens, cache), "moqc_attention"
    )
    arguments, places = list(named.values()), list(named)
    if cache is None:
        return relax.call_tir(function, arguments, call.ty)
    in_place = [-1, places.index("k_cache"), places.index("v_cache")]
    return relax.op.call_tir_inplace(function, relax.Tuple(arguments), in_place, list(call.ty.fields))


def _attention_shape(call: relax.Call, target: Target) -> AttentionShape:
    attrs, named = attributes(call), operands(call)
    return AttentionShape(
        heads=int(named["q"].ty.shape[1]),
        key_heads=int(named["k"].ty.shape[1]),
        key_width=int(named["q"].ty.shape[3]),
        value_width=int(named["v"].ty.shape[3]),
        scale=float(attrs["scale"]),
        window=attrs["window"],
        softcap=float(attrs["softcap"]),
        causal=bool(attrs["causal"]),
        sinks="sinks" in named,
        lanes=target.vector_lanes,
        chunk=attrs.get("chunk", 0),
        latent=bool(attrs.get("latent", 0)),
        stored=str(named["k_cache"].ty.dtype) if "k_cache" in named else "float32",
    )


def _extent(extent: Any, name: str) -> int | tirx.Var:
    """A dimension of a kernel's parameter for the dimension `extent` of an argument."""
    return int(extent) if isinstance(extent, tirx.IntImm) else tirx.Var(name, "int64")


def lower_experts(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.experts``: route, gate and up, down."""
    named = operands(call)
    x, ids, weights, down = (named[name] for name in ("x", "ids", "weights", "down"))
    experts, hidden, intermediate = (int(extent) for extent in down.ty.shape)
    top_k, tokens = int(ids.ty.shape[1]), x.ty.shape[0]
    names = tuple(name for name in EXPERT_OPERANDS if name in named)
    activation = attributes(call)["activation"]
    shape = DenseExpertsShape(experts, top_k, hidden, intermediate, activation, names, target.vector_lanes)
    routing = lower_route(bb, ids, experts)
    first = [named[name] for name in ("gate", "up", "gate_bias", "up_bias") if name in named]
    up = bb.add_func(dense_up_kernel(shape), "moqc_dense_up")
    inner = relax.TensorType([tokens * top_k, intermediate], "float32")
    inner = bb.emit(relax.call_tir(up, [x, *routing, *first], inner))
    last = [named[name] for name in ("down", "down_bias") if name in named]
    function = bb.add_func(dense_down_kernel(shape), "moqc_dense_down")
    return relax.call_tir(function, [inner, *routing, weights, *last], call.ty)


def lower_dense_linear(
    bb: relax.BlockBuilder, x: relax.Expr, weight: relax.Expr, target: Target
) -> relax.Expr:
    """``matmul(x, permute_dims(weight))`` with float32 x [..., K] and weight [N, K]."""
    rows, columns = (int(extent) for extent in weight.ty.shape)
    lead = list(x.ty.shape)[:-1]
    kernel = dense_linear_kernel(rows, columns, lead=len(lead), lanes=target.vector_lanes)
    function = bb.add_func(kernel, "moqc_dense_linear")
    return relax.call_tir(function, [x, weight], relax.TensorType([*lead, rows], "float32"))


def lower_rms_norm(
    bb: relax.BlockBuilder, x: relax.Expr, weight: relax.Expr | None, epsilon: float, target: Target
) -> relax.Expr:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis of float32 x, of constant extent."""
    *lead, columns = list(x.ty.shape)
    kernel = rms_norm_kernel(
        int(columns), epsilon, weighted=weight is not None, lead=len(lead), lanes=target.vector_lanes
    )
    function = bb.add_func(kernel, "moqc_rms_norm")
    return relax.call_tir(function, [x] if weight is None else [x, weight], x.ty)


def lower_topk(bb: relax.BlockBuilder, call: relax.Call, _target: Target) -> relax.Expr:
    """``R.topk`` of values and indices: the largest of the last axis of float32 x, of constant extent."""
    *lead, columns = list(call.args[0].ty.shape)
    types = list(call.ty.fields)
    count = int(types[0].shape[-1])
    function = bb.add_func(topk_kernel(int(columns), count, str(types[1].dtype), lead=len(lead)), "moqc_topk")
    return relax.call_tir(function, [call.args[0]], types)
