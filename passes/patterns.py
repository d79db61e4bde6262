"""Groups of Relax operators that have one kernel: what the front end leaves of linears and RMS norms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import relax, tirx
from tvm.ir import GenericConst

from moqc.ir.ops import is_call

Definitions = Mapping[relax.Var, relax.Expr]
"""Variable -> the expression that it is bound to."""


@dataclass(frozen=True)
class Linear:
    """``matmul(x, permute_dims(weight))``: float32 x [..., K], weight [N, K] of constant shape."""

    x: relax.Expr
    weight: relax.Expr


@dataclass(frozen=True)
class RmsNorm:
    """``x * rsqrt(mean(x^2, axis=-1) + epsilon)``, times the weight [columns] unless that is None."""

    x: relax.Expr
    weight: relax.Expr | None
    epsilon: float


def match_linear(call: relax.Call, definitions: Definitions) -> Linear | None:
    """The linear that `call` computes, or None."""
    if not is_call(call, "relax.matmul"):
        return None
    transpose = definition(call.args[1], definitions)
    if not is_call(transpose, "relax.permute_dims"):
        return None
    matrix = transpose.args[0]
    types = (call.args[0].ty, matrix.ty, call.ty)
    if any(not isinstance(ty, relax.TensorType) or str(ty.dtype) != "float32" for ty in types):
        return None
    if matrix.ty.ndim != 2 or not all(isinstance(extent, tirx.IntImm) for extent in matrix.ty.shape):
        return None
    return Linear(call.args[0], matrix)


def match_rms_norm(call: relax.Call, definitions: Definitions) -> RmsNorm | None:
    """The RMS norm that `call` computes, with its weight if it multiplies with one, or None."""
    if not is_call(call, "relax.multiply"):
        return None
    plain = _match_plain_norm(call, definitions)
    if plain is not None:
        return plain
    for weight, normed in (call.args, reversed(call.args)):
        found = definition(normed, definitions)
        inner = _match_plain_norm(found, definitions) if is_call(found, "relax.multiply") else None
        if inner is not None and _is_weight(weight, inner.x):
            return RmsNorm(inner.x, weight, inner.epsilon)
    return None


def is_top(call: relax.Call) -> bool:
    """Whether `call` is a top-k that has a kernel: values and indices, the largest of a fixed last axis."""
    if not is_call(call, "relax.topk"):
        return False
    x, attrs = call.args[0], call.attrs
    last = int(attrs.axis) in (-1, x.ty.ndim - 1)
    return last and bool(attrs.largest) and str(attrs.ret_type) == "both" and _has_rows(x)


def _match_plain_norm(call: relax.Call, definitions: Definitions) -> RmsNorm | None:
    for x, root in (call.args, reversed(call.args)):
        rsqrt = definition(root, definitions)
        if not is_call(rsqrt, "relax.rsqrt"):
            continue
        add = definition(rsqrt.args[0], definitions)
        if not is_call(add, "relax.add") or not isinstance(add.args[1], GenericConst):
            continue
        mean = definition(add.args[0], definitions)
        if not is_call(mean, "relax.mean") or not _is_last_axis(mean):
            continue
        if _is_square(definition(mean.args[0], definitions), x) and _has_rows(x):
            return RmsNorm(x, None, float(add.args[1].value.numpy()))
    return None


def definition(expr: relax.Expr, definitions: Definitions) -> relax.Expr:
    """What a variable is bound to, casts to the dtype that a value has already left out; else `expr`."""
    found = definitions.get(expr, expr) if isinstance(expr, relax.Var) else expr
    while is_call(found, "relax.astype") and str(found.args[0].ty.dtype) == str(found.attrs.dtype):
        found = definitions.get(found.args[0], found.args[0])
    return found


def _is_last_axis(mean: relax.Call) -> bool:
    axes = [] if mean.attrs.axis is None else [int(axis) for axis in mean.attrs.axis]
    return bool(mean.attrs.keepdims) and axes in ([-1], [mean.args[0].ty.ndim - 1])


def _is_square(expr: relax.Expr, x: relax.Expr) -> bool:
    if is_call(expr, "relax.multiply"):
        return bool(expr.args[0].same_as(x) and expr.args[1].same_as(x))
    if not is_call(expr, "relax.power") or not isinstance(expr.args[1], GenericConst):
        return False
    return bool(expr.args[0].same_as(x)) and float(expr.args[1].value.numpy()) == 2.0


def _has_rows(x: relax.Expr) -> bool:
    """Whether `x` is float32 with a last axis of constant extent."""
    return str(x.ty.dtype) == "float32" and isinstance(x.ty.shape[-1], tirx.IntImm)


def _is_weight(weight: relax.Expr, x: relax.Expr) -> bool:
    ty = weight.ty
    return (
        isinstance(weight, relax.Var)
        and ty.ndim == 1
        and str(ty.dtype) == "float32"
        and isinstance(ty.shape[0], tirx.IntImm)
        and int(ty.shape[0]) == int(x.ty.shape[-1])
    )
