"""The int8 decode kernels for 2 to 181 tokens: ``quads_layer.cu``.

Two launches a layer, as in `experts`, but without one before them: each block finds its share of the work
in the router's ids. What the first leaves for the second, it leaves by *pair*, a token and
one of its choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from moqc.errors import InternalError, UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.emit import Kernel, kernel
from moqc.schedules.cuda.experts import Pointers, declare_biases, declare_packed
from moqc.schedules.cuda.plan import COLUMN_TOKENS, SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.quads import QuadsPlan, quads_bytes
from moqc.schedules.cuda.templates import CPP, distinct, formats_of, layer_of


def launch_gate_up_quads(
    k: Kernel, shape: ExpertsShape, plan: QuadsPlan, at: Pointers, tokens: tirx.Var, id_dtype: str, most: int
) -> None:
    """The first product, with the activation function and the router's weights; clears y."""
    function, shared = gate_up_quads_of(shape, plan, id_dtype, most)
    names = ("x", "ids", "weights")
    arguments = [*(at[name] for name in names), tirx.Cast("int32", tokens)]
    arguments += [at[name] for name in ("table", "gate_bias", "up_bias", "hidden", "shifts", "y")]
    k.launch(plan.grid, 32 * plan.warps, shared, function, *arguments, *at["gate"], *at["up"])


def launch_down_quads(
    k: Kernel, shape: ExpertsShape, plan: QuadsPlan, at: Pointers, tokens: tirx.Var, id_dtype: str, most: int
) -> None:
    """The second product with the weighted sum, added to y in no fixed order."""
    function, shared = down_quads_of(shape, plan, id_dtype, most)
    arguments = [at["hidden"], at["shifts"], at["ids"], at["weights"], tirx.Cast("int32", tokens)]
    arguments += [at[name] for name in ("table", "down_bias", "y")]
    k.launch(plan.grid, 32 * plan.warps, shared, function, *arguments, *at["down"])


def gate_up_quads_of(shape: ExpertsShape, plan: QuadsPlan, id_dtype: str, most: int) -> tuple[str, int]:
    """The function of the first product for up to `most` tokens, and a block's shared memory."""
    formats = distinct(shape.gate, shape.up)
    lists = ", ".join(map(formats_of, (shape.gate, shape.up, formats)))
    plan.check(shape.hidden, True, formats)
    shared = _fitting(plan, shape, 2 if shape.gate else 1, formats, most)
    return _function("gate_up", shape, plan, most, lists, id_dtype), shared


def down_quads_of(shape: ExpertsShape, plan: QuadsPlan, id_dtype: str, most: int) -> tuple[str, int]:
    """The same of the second product."""
    formats = distinct(shape.down)
    lists = f"{formats_of(shape.down)}, {formats_of(formats)}"
    plan.check(shape.intermediate, False, formats)
    shared = _fitting(plan, shape, 1, formats, most)
    return _function("down", shape, plan, most, lists, id_dtype), shared


def quads_kernel(
    name: str, shape: ExpertsShape, plan: QuadsPlan, x_dtype: str, id_dtype: str
) -> tirx.PrimFunc:
    """Build ``gate_up`` or ``down`` by itself, for up to 8 tokens."""
    if name == "gate_up":
        return gate_up_quads_kernel(shape, plan, x_dtype, id_dtype)
    return down_quads_kernel(shape, plan, id_dtype)


def gate_up_quads_kernel(shape: ExpertsShape, plan: QuadsPlan, x_dtype: str, id_dtype: str) -> tirx.PrimFunc:
    """Build the first product by itself, for up to 8 tokens.

    Parameters of the PrimFunc: x `x_dtype` ``[T, H]`` (float16 or float32), ids `id_dtype` and weights
    float32 ``[T, top_k]``, table int32 ``[3, E, 2]``, the classes of gate, then of up, their biases if any,
    and the outputs hidden float16 ``[T, top_k, I]``, shifts uint8 ``[T, top_k, 16 ceil(I / 256)]`` and y
    float32 ``[T, H]``, which is cleared for `down_quads_kernel`.
    """
    with kernel("gate_up", plan=str(plan), formats=[str(f) for f in distinct(shape.gate, shape.up)]) as k:
        tokens = tirx.Var("t", "int64")
        at: dict[str, Any] = {"x": k.parameter("x", [tokens, shape.hidden], x_dtype)}
        at |= _declare_choices(k, shape, tokens, id_dtype)
        at |= declare_packed(k, shape, "gate", "up")
        at |= declare_biases(k, shape, at["table"], "gate_bias", "up_bias")
        at |= _declare_hidden(k, shape, tokens)
        at["y"] = k.parameter("y", [tokens, shape.hidden], "float32")
        launch_gate_up_quads(k, shape, plan, at, tokens, id_dtype, COLUMN_TOKENS)
    return k.finish()


def down_quads_kernel(shape: ExpertsShape, plan: QuadsPlan, id_dtype: str) -> tirx.PrimFunc:
    """Build the second product by itself, for up to 8 tokens.

    Parameters of the PrimFunc: hidden, shifts, ids, weights and table of `gate_up_quads_kernel`, the classes
    of down, its bias if any, and y float32 ``[T, H]``, added to in place.
    """
    with kernel("down", plan=str(plan), formats=[str(f) for f in distinct(shape.down)]) as k:
        tokens = tirx.Var("t", "int64")
        at = _declare_hidden(k, shape, tokens) | _declare_choices(k, shape, tokens, id_dtype)
        at |= declare_packed(k, shape, "down")
        at |= declare_biases(k, shape, at["table"], "down_bias")
        at["y"] = k.parameter("y", [tokens, shape.hidden], "float32")
        launch_down_quads(k, shape, plan, at, tokens, id_dtype, COLUMN_TOKENS)
    return k.finish()


def _declare_choices(k: Kernel, shape: ExpertsShape, tokens: tirx.Var, id_dtype: str) -> dict[str, Any]:
    return {
        "ids": k.parameter("ids", [tokens, shape.top_k], id_dtype),
        "weights": k.parameter("weights", [tokens, shape.top_k], "float32"),
        "table": k.parameter("table", [3, shape.experts, 2], "int32"),
    }


def _declare_hidden(k: Kernel, shape: ExpertsShape, tokens: tirx.Var) -> dict[str, Any]:
    shifts = -(-shape.intermediate // COLUMNS) * (COLUMNS // ROWS)
    return {
        "hidden": k.parameter("hidden", [tokens, shape.top_k, shape.intermediate], "float16"),
        "shifts": k.parameter("shifts", [tokens, shape.top_k, shifts], "uint8"),
    }


def _function(name: str, shape: ExpertsShape, plan: QuadsPlan, most: int, lists: str, id_dtype: str) -> str:
    sizes = f"{layer_of(shape)}, {plan.cpp}, {shape.top_k}, {most}"
    return f"moqc::quads::{name}<{sizes}, {lists}, {CPP[id_dtype]}>"


def _fitting(
    plan: QuadsPlan, shape: ExpertsShape, projections: int, formats: Sequence[Format], most: int
) -> int:
    """The shared memory of a block."""
    if shape.experts > 1024:
        raise UserError(f"{shape.experts} experts: the CUDA kernels take up to 1024")
    shared = quads_bytes(plan, projections, formats, most * shape.top_k, shape.experts)
    if shared > SHARED_BYTES:
        raise InternalError(f"plan {plan} does not fit a block ({shared} bytes of shared memory)")
    return shared
