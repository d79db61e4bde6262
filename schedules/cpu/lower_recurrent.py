"""Replace recurrent operators by calls of their CPU kernels."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx

from moqc.ir.ops import operands
from moqc.schedules.cpu.causal_conv import ConvShape, causal_conv_kernel
from moqc.schedules.cpu.recurrent import RecurrentShape, recurrent_kernel
from moqc.targets import Target


def lower_recurrent(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.recurrent`` (the result is out) and ``R.moqc.cached_recurrent`` (out and the state)."""
    named = operands(call)
    keys, values = named["k"].ty.shape, named["v"].ty.shape
    shape = RecurrentShape(
        heads=int(values[2]),
        key_heads=int(keys[2]),
        keys=int(keys[3]),
        columns=int(values[3]),
        wide_decay=named["decay"].ty.ndim == 4,
        beta="beta" in named,
        rate="rate" in named,
        lanes=target.vector_lanes,
    )
    kernel = recurrent_kernel(shape, *_extents(values), _rows(named))
    return _call(bb, call, kernel, "moqc_recurrent")


def lower_causal_conv(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.causal_conv`` (the result is out) and ``R.moqc.cached_causal_conv`` (out and the state)."""
    named = operands(call)
    channels, window = (int(extent) for extent in named["weight"].ty.shape)
    shape = ConvShape(channels, window, "bias" in named, target.vector_lanes)
    kernel = causal_conv_kernel(shape, *_extents(named["x"].ty.shape), _rows(named))
    return _call(bb, call, kernel, "moqc_causal_conv")


def _extents(shape: Any) -> tuple[int | tirx.Var, int | tirx.Var]:
    """Batch and tokens of a kernel's parameters, for an argument of `shape`."""
    batch, tokens = (
        int(extent) if isinstance(extent, tirx.IntImm) else tirx.Var(name, "int64")
        for extent, name in zip(shape, ("batch", "tokens"), strict=False)
    )
    return batch, tokens


def _rows(named: dict[str, relax.Expr]) -> int | None:
    """Sequences the state has room for; None without a state."""
    return int(named["state"].ty.shape[0]) if "state" in named else None


def _call(bb: relax.BlockBuilder, call: relax.Call, kernel: tirx.PrimFunc, name: str) -> relax.Expr:
    named = operands(call)
    function = bb.add_func(kernel, name)
    if "state" not in named:
        return relax.call_tir(function, list(named.values()), call.ty)
    in_place = [-1, list(named).index("state")]
    return relax.op.call_tir_inplace(
        function, relax.Tuple(list(named.values())), in_place, list(call.ty.fields)
    )
