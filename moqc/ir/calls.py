"""Read a call of a moqc operator: its operands by name and its attributes as plain Python values."""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Op

from moqc.errors import VerifyError
from moqc.quant.formats import Format

EXPERTS = "relax.moqc.experts"
MIXED_EXPERTS = "relax.moqc.mixed_experts"
LINEAR = "relax.moqc.linear"
EMBEDDING = "relax.moqc.embedding"
ATTENTION = "relax.moqc.attention"
CACHED_ATTENTION = "relax.moqc.cached_attention"
PRUNE_ROUTING = "relax.moqc.prune_routing"
RECURRENT = "relax.moqc.recurrent"
CACHED_RECURRENT = "relax.moqc.cached_recurrent"
CAUSAL_CONV = "relax.moqc.causal_conv"
CACHED_CAUSAL_CONV = "relax.moqc.cached_causal_conv"

PROJECTIONS = ("gate", "up", "down")
EXPERT_OPERANDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
"""Operands an experts call may have, in their order; up and down are always there."""

FIXED_ARGUMENTS = {
    EXPERTS: ("x", "ids", "weights"),
    MIXED_EXPERTS: ("x", "ids", "weights"),
    LINEAR: ("x",),
    EMBEDDING: ("ids",),
    ATTENTION: ("q", "k", "v", "positions"),
    CACHED_ATTENTION: ("q", "k", "v", "positions", "k_cache", "v_cache"),
    PRUNE_ROUTING: ("x", "ids", "weights", "positions"),
    RECURRENT: ("q", "k", "v", "decay", "positions"),
    CACHED_RECURRENT: ("q", "k", "v", "decay", "positions", "state"),
    CAUSAL_CONV: ("x", "weight", "positions"),
    CACHED_CAUSAL_CONV: ("x", "weight", "positions", "state"),
}
"""Operator name -> its leading arguments; the ones after them are named by the attribute `operands`."""


def plain(value: Any) -> Any:
    """`value` with TVM's containers and integers turned into dict, list, int and str."""
    if isinstance(value, tvm_ffi.Map | dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tvm_ffi.Array | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, tirx.IntImm):
        return int(value.value)
    if isinstance(value, str):
        return str(value)
    return value


def is_call(expr: Any, *names: str) -> bool:
    """Whether `expr` calls one of the operators `names` (full names such as ``relax.matmul``)."""
    return isinstance(expr, relax.Call) and isinstance(expr.op, Op) and str(expr.op.name) in names


def attributes(call: relax.Call) -> dict[str, Any]:
    """The attributes of a moqc operator's call, as plain values."""
    return {} if call.attrs is None else {str(key): plain(call.attrs[key]) for key in call.attrs.keys()}  # noqa: SIM118


def operands(call: relax.Call) -> dict[str, relax.Expr]:
    """The arguments of a moqc operator's call by name, the fixed ones first.

    Raises VerifyError when the attribute `operands` does not name every further argument.
    """
    fixed = FIXED_ARGUMENTS[str(call.op.name)]
    names = [*fixed, *attributes(call).get("operands", [])]
    if len(names) != len(call.args):
        raise VerifyError(f"{describe(call)}: {len(call.args)} arguments, but they are named {names}")
    return dict(zip(names, call.args, strict=True))


def operand(call: relax.Call, name: str) -> relax.Expr:
    """The argument of a moqc operator's call named `name`, for example ``down`` or ``gate.0.codes``.

    Raises VerifyError naming the operands there are.
    """
    found = operands(call)
    if name not in found:
        raise VerifyError(f"{describe(call)} has no operand {name!r}; it has {', '.join(found)}")
    return found[name]


def bit_classes(call: relax.Call) -> dict[str, tuple[Format, ...]]:
    """Projection -> the formats of its bit classes, in class order, of a mixed_experts call."""
    classes: dict[str, list[Format]] = {}
    for entry in attributes(call)["classes"]:
        projection, _, name = entry.partition(":")
        classes.setdefault(projection, []).append(Format.parse(name))
    return {projection: tuple(formats) for projection, formats in classes.items()}


def describe(call: relax.Call) -> str:
    """`R.moqc.experts of model.layers.0.mlp.experts`: how errors name a call."""
    return f"R.{str(call.op.name).removeprefix('relax.')} of {attributes(call).get('site', '(no site)')}"
