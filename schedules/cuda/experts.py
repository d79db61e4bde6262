"""The decode kernels of an experts block with packed weights, for NVIDIA GPUs: 1 or 8 tokens at once.

Two launches a layer: `launch_gate_up` (with the activation function and the routing weight) and `launch_down`
(with the weighted sum); for more than one token `launch_route` before them lists *slots*, an expert and up
to 8 of its tokens. Each slot's expert is read once, whatever its formats: all bit classes of a layer,
different ones for gate, up and down too, are in one launch. The device code is ``decode.cu``, ``rows.cu`` and
``routing.cu``; here its templates are chosen and TVM is told how to launch them. `layer.py` puts a whole
layer together; the functions at the end build each kernel by itself, for tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx

from moqc.errors import UserError
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.emit import Kernel, kernel
from moqc.schedules.cuda.plan import COLUMN_TOKENS, ExpertsShape
from moqc.schedules.cuda.rows import RowsPlan
from moqc.schedules.cuda.templates import (
    SlotsPlan,
    distinct,
    down_groups,
    down_of,
    gate_up_groups,
    gate_up_of,
)

Pointers = Mapping[str, Any]
"""Addresses by name: a parameter's, a workspace section's; lists of them for ``gate``, ``up`` and
``down``."""


def launch_route(
    k: Kernel, shape: ExpertsShape, at: Pointers, tokens: tirx.Var, *, halve: bool = False
) -> None:
    """List the slots: `at` has ids and weights, and the outputs slots, members, shares and hit.

    `halve`: also make the float16 copies of x that `launch_gate_up` reads, into images, and clear y.
    """
    if shape.experts > 1024:
        raise UserError(f"{shape.experts} experts: the CUDA kernels take up to 1024")
    threads = max(-(-shape.experts // 32) * 32, 512)
    names = ("slots", "members", "shares", "hit")
    arguments = [at["ids"], at["weights"], tirx.Cast("int32", tokens), *(at[name] for name in names)]
    sizes = f"{shape.experts}, {shape.top_k}"
    if halve:
        more = [at[name] for name in ("x", "images", "factors", "y")]
        function = f"moqc::route_and_halve<{sizes}, {shape.hidden}>"
        k.launch(tokens + 1, threads, 0, function, *arguments, *more)
    else:
        k.launch(1, threads, 0, f"moqc::route<{sizes}>", *arguments)


def launch_gate_up(
    k: Kernel,
    shape: ExpertsShape,
    plan: SlotsPlan,
    at: Pointers,
    tokens: tirx.Var,
    slots: Any,
    id_dtype: str,
    *,
    routed: bool = False,
) -> None:
    """The first product, for as many as `slots` slots; of `id_dtype`, and for 1 token the router's ids.

    What `at` has as x are activations, or bytes of the workspace: what `launch_route` made of them. `routed`:
    right after that launch, with the router's ids of 2 to 8 tokens as slots, which are read before it ends.
    """
    function, shared = gate_up_of(shape, plan, id_dtype, routed=routed)
    names = ("slots", "shares", "members", "hit", "table", "gate_bias", "up_bias", "hidden", "shifts", "y")
    factors = at.get("factors", at["table"])  # not read with activations as they are
    arguments = [at["x"], factors, tirx.Cast("int32", tokens), tirx.const(shape.top_k, "int32")]
    arguments += [at[name] for name in names]
    blocks = slots * gate_up_groups(shape, plan)
    k.launch(blocks, 32 * plan.warps, shared, function, *arguments, *at["gate"], *at["up"])


def launch_down(
    k: Kernel,
    shape: ExpertsShape,
    plan: SlotsPlan,
    at: Pointers,
    tokens: tirx.Var,
    slots: Any,
    id_dtype: str,
    *,
    many: bool = False,
) -> None:
    """The second product with the weighted sum; `many`: for more than 8 tokens.

    Where one block sees all experts (1 token and ``plan.warps >= top_k * ceil(I / 256)``), y is written and
    its bits are the same every time; else the order in which blocks add to it is not fixed.
    """
    units, adds = -(-shape.intermediate // COLUMNS), True
    if isinstance(plan, RowsPlan):
        slices = slots * (units // plan.units)
    elif many:
        slices = slots * -(-units // plan.warps)
    else:
        slices = (slots * units + (plan.warps - 1)) // plan.warps
        adds = plan.tokens > 1 or slices > 1
    function, shared = down_of(shape, plan, id_dtype, adds=adds, many=many)
    arguments = [at["hidden"], at["shifts"], tirx.Cast("int32", tokens)]
    arguments += [at[name] for name in ("slots", "shares", "members", "hit")]
    arguments += [tirx.const(shape.top_k, "int32"), at["table"], at["down_bias"], at["y"], *at["down"]]
    blocks = slices * down_groups(shape, plan)
    k.launch(blocks, 32 * plan.warps, shared, function, *arguments)


def declare_packed(k: Kernel, shape: ExpertsShape, *projections: str) -> dict[str, list[Any]]:
    """Declare the classes of projections, in the order of their names."""
    rows, columns = shape.intermediate, shape.hidden
    return {
        name: k.packed(name, getattr(shape, name), *((columns, rows) if name == "down" else (rows, columns)))
        for name in projections
    }


def declare_biases(k: Kernel, shape: ExpertsShape, table: Any, *names: str) -> dict[str, Any]:
    """Declare the biases there are; `table` stands in for the others, and is not read."""
    widths = {"gate_bias": shape.intermediate, "up_bias": shape.intermediate, "down_bias": shape.hidden}
    return {
        name: k.parameter(name, [shape.experts, widths[name]], "float32") if name in shape.biases else table
        for name in names
    }


def route_kernel(shape: ExpertsShape, dtype: str) -> tirx.PrimFunc:
    """Build the lists of slots by themselves.

    Parameters of the PrimFunc: ids `dtype` ``[T, top_k]``, weights float32 ``[T, top_k]``, and the outputs
    slots int32 ``[S]`` (experts hit, rising), members int32 ``[S, 8]`` (tokens, -1 for none), shares float32
    ``[S, 8]`` (weight of the expert for each of them, 0 for none) and hit int32 ``[1]`` (how many slots are
    used); ``S`` at least ``shape.slots(T)``. Ids out of range are dropped.
    """
    with kernel("route", experts=shape.experts, top_k=shape.top_k) as k:
        tokens, slots = tirx.Var("t", "int64"), tirx.Var("s", "int64")
        at = {
            "ids": k.parameter("ids", [tokens, shape.top_k], dtype),
            "weights": k.parameter("weights", [tokens, shape.top_k], "float32"),
            "slots": k.parameter("slots", [slots], "int32"),
            "members": k.parameter("members", [slots, COLUMN_TOKENS], "int32"),
            "shares": k.parameter("shares", [slots, COLUMN_TOKENS], "float32"),
            "hit": k.parameter("hit", [1], "int32"),
        }
        launch_route(k, shape, at, tokens)
    return k.finish()


def gate_up_kernel(
    shape: ExpertsShape, plan: SlotsPlan, x_dtype: str, id_dtype: str = "int32"
) -> tirx.PrimFunc:
    """Build the first product with the activation function by itself.

    Parameters of the PrimFunc: x `x_dtype` ``[T, H]`` (float16 or float32, read as float16; uint8: float16 as
    `launch_route` leaves it, ``[T, 512 ceil(H / 256)]``, and then its factors float32 ``[T]``), slots
    `id_dtype` ``[S]``, shares float32 ``[S, plan.tokens]``, members int32 ``[S, 8]`` and hit int32 ``[1]``
    (not for 1 token), table int32 ``[3, E, 2]``, the classes of gate, then of up (codes, scales, zeros
    unless symmetric), the biases of gate and up if any, and the outputs hidden float16 ``[S, plan.tokens,
    I]``, shifts uint8 ``[S, plan.tokens, 16 ceil(I / 256)]`` (the exponents that 16 rows of hidden share, 0
    unless they are large) and y float32 ``[T, H]``, which is cleared for `down_kernel`. For 1 token, slots
    and shares are the router's ids and weights. A projection of one class holds all experts in order.
    """
    facts = {"plan": str(plan), "formats": [str(fmt) for fmt in distinct(shape.gate, shape.up)]}
    with kernel("gate_up", **facts) as k:
        tokens, slots = tirx.Var("t", "int64"), tirx.Var("s", "int64")
        if x_dtype == "uint8":
            at = {"x": k.parameter("x", [tokens, 2 * COLUMNS * -(-shape.hidden // COLUMNS)], x_dtype)}
            at["factors"] = k.parameter("factors", [tokens], "float32")
        else:
            at = {"x": k.parameter("x", [tokens, shape.hidden], x_dtype)}
        at |= _declare_slots(k, shape, plan, slots, id_dtype)
        at |= declare_packed(k, shape, "gate", "up")
        at |= declare_biases(k, shape, at["table"], "gate_bias", "up_bias")
        at |= _declare_hidden(k, shape, plan, slots)
        at["y"] = k.parameter("y", [tokens, shape.hidden], "float32")
        launch_gate_up(k, shape, plan, at, tokens, slots, id_dtype)
    return k.finish()


def down_kernel(
    shape: ExpertsShape, plan: SlotsPlan, id_dtype: str = "int32", *, many: bool = False
) -> tirx.PrimFunc:
    """Build the second product with the weighted sum over a token's experts by itself.

    Parameters of the PrimFunc: hidden and shifts of `gate_up_kernel`, slots, shares, members, hit and table
    as there, the classes of down, its bias if any, and y float32 ``[T, H]``, added to in place. `many` is
    for more than 8 tokens.
    """
    facts = {"plan": str(plan), "formats": [str(fmt) for fmt in distinct(shape.down)], "many": many}
    with kernel("down", **facts) as k:
        tokens, slots = tirx.Var("t", "int64"), tirx.Var("s", "int64")
        at = _declare_hidden(k, shape, plan, slots)
        at |= _declare_slots(k, shape, plan, slots, id_dtype)
        at |= declare_packed(k, shape, "down")
        at |= declare_biases(k, shape, at["table"], "down_bias")
        at["y"] = k.parameter("y", [tokens, shape.hidden], "float32")
        used = shape.top_k if plan.tokens == 1 else slots
        launch_down(k, shape, plan, at, tokens, used, id_dtype, many=many)
    return k.finish()


def _declare_slots(
    k: Kernel, shape: ExpertsShape, plan: SlotsPlan, slots: tirx.Var, id_dtype: str
) -> dict[str, Any]:
    at = {
        "slots": k.parameter("slots", [slots], id_dtype),
        "shares": k.parameter("shares", [slots, plan.tokens], "float32"),
    }
    if plan.tokens > 1:
        at["members"] = k.parameter("members", [slots, COLUMN_TOKENS], "int32")
        at["hit"] = k.parameter("hit", [1], "int32")
    at["table"] = k.parameter("table", [3, shape.experts, 2], "int32")
    return {"members": at["table"], "hit": at["table"]} | at


def _declare_hidden(k: Kernel, shape: ExpertsShape, plan: SlotsPlan, slots: tirx.Var) -> dict[str, Any]:
    shifts = -(-shape.intermediate // COLUMNS) * (COLUMNS // ROWS)
    return {
        "hidden": k.parameter("hidden", [slots, plan.tokens, shape.intermediate], "float16"),
        "shifts": k.parameter("shifts", [slots, plan.tokens, shifts], "uint8"),
    }
