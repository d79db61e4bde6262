"""Result types of moqc's operators.

These rules run whenever a call is built, so they check only what they read; `moqc.ir.verify` checks the rest.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from moqc.errors import VerifyError
from moqc.ir.calls import attributes, describe, operand, operands


def tensor_type(call: relax.Call, name: str, ndim: int | None = None) -> relax.TensorType:
    """The tensor type of the operand `name`; VerifyError unless it has `ndim` dimensions of known extent."""
    ty = operand(call, name).ty
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        raise VerifyError(f"{describe(call)}: {name} is {ty}, not a tensor of known shape")
    if ndim is not None and ty.ndim != ndim:
        raise VerifyError(f"{describe(call)}: {name} has {ty.ndim} dimensions, expected {ndim}")
    return ty


def infer_experts(call: relax.Call, _builder: Any) -> relax.TensorType:
    """``x [T, H]`` -> ``[T, H]``, for experts and mixed_experts; its `hidden` may give another width."""
    x = tensor_type(call, "x", 2)
    tokens, hidden = list(x.shape)
    return relax.TensorType([tokens, attributes(call).get("hidden", hidden)], x.dtype)


def infer_linear(call: relax.Call, _builder: Any) -> relax.TensorType:
    """``x [..., K]`` -> ``[..., rows]``."""
    x = tensor_type(call, "x")
    return relax.TensorType([*list(x.shape)[:-1], attributes(call)["rows"]], x.dtype)


def infer_embedding(call: relax.Call, _builder: Any) -> relax.TensorType:
    """``ids [...]`` -> float32 ``[..., columns]``."""
    ids = tensor_type(call, "ids")
    return relax.TensorType([*list(ids.shape), attributes(call)["columns"]], "float32")


def infer_attention(call: relax.Call, _builder: Any) -> relax.TensorType:
    """``q [B, H, S, D]``, ``v [B, Hk, S, Dv]`` -> ``[B, S, H, Dv]``."""
    q, v = tensor_type(call, "q", 4), tensor_type(call, "v", 4)
    batch, heads, tokens, _ = list(q.shape)
    return relax.TensorType([batch, tokens, heads, v.shape[3]], q.dtype)


def infer_cached_attention(call: relax.Call, builder: Any) -> relax.TupleType:
    """The output of attention and both caches, in the types they came in."""
    caches = [tensor_type(call, "k_cache", 4), tensor_type(call, "v_cache", 4)]
    return relax.TupleType([infer_attention(call, builder), *caches])


def infer_prune_routing(call: relax.Call, _builder: Any) -> relax.TupleType:
    """The types of ids and weights."""
    return relax.TupleType([tensor_type(call, "ids", 2), tensor_type(call, "weights", 2)])


def infer_recurrent(call: relax.Call, _builder: Any) -> relax.TensorType:
    """``v [B, S, H, V]`` -> the same."""
    v = tensor_type(call, "v", 4)
    return relax.TensorType(list(v.shape), v.dtype)


def infer_causal_conv(call: relax.Call, _builder: Any) -> relax.TensorType:
    """``x [B, S, C]`` -> the same."""
    x = tensor_type(call, "x", 3)
    return relax.TensorType(list(x.shape), x.dtype)


def infer_stateful(call: relax.Call, _builder: Any) -> relax.TupleType:
    """The output of cached_recurrent (like v) or cached_causal_conv (like x), and the state."""
    like = tensor_type(call, "v" if "v" in operands(call) else "x")
    return relax.TupleType([relax.TensorType(list(like.shape), like.dtype), tensor_type(call, "state")])
