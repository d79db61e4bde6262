"""One MoE layer with packed weights as one PrimFunc, for any number of tokens, on NVIDIA GPUs.

The host looks at the number of tokens and launches what suits it: for 1 token the two decode kernels; for
more two int8 kernels, or lists of slots first; for many, tiles of slots or the grouped product (see
`ladder`). What the kernels leave for each other lies in one workspace.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.errors import InternalError
from moqc.schedules.cuda.emit import Kernel, kernel
from moqc.schedules.cuda.experts import (
    declare_biases,
    declare_packed,
    launch_down,
    launch_gate_up,
    launch_route,
)
from moqc.schedules.cuda.grouped import Tile, large_for, launch_grouped, launch_tiles, tiles_for
from moqc.schedules.cuda.grouped_bytes import by_bytes, launch_bytes
from moqc.schedules.cuda.grouped_mma import launch_tiled
from moqc.schedules.cuda.ladder import Rung, ladder
from moqc.schedules.cuda.plan import COLUMN_TOKENS, SHARED_BYTES, ExpertsShape, Plan
from moqc.schedules.cuda.quads import QuadsPlan
from moqc.schedules.cuda.quads_layer import launch_down_quads, launch_gate_up_quads
from moqc.schedules.cuda.records import load, plans
from moqc.schedules.cuda.templates import BIASES, AnyPlan, SlotsPlan
from moqc.schedules.cuda.workspace import ALIGNMENT, capacity_of, sections, workspace_bytes
from moqc.schedules.plan_records import Records

GROUPED_PAIRS = 12
"""Tokens an expert, on average, from which on the grouped product was faster on an H200."""

MOST_NAMED = 32
"""Up to so many experts, the first product finds those hit by 2 to 8 tokens by itself, ahead of the lists.

2 to 4 us less for Mixtral's 8 experts; with 64 and 128, which are several words of bits, 0 to 4 us more.
"""


def grouped_from(shape: ExpertsShape) -> int:
    """The number of tokens from which on the grouped product is used."""
    return max(COLUMN_TOKENS + 1, -(-GROUPED_PAIRS * shape.experts // shape.top_k))


def experts_function(
    shape: ExpertsShape,
    *,
    x_dtype: str = "float32",
    id_dtype: str = "int64",
    grouped: int | None = None,
    warp_groups: bool = True,
    shared: int = SHARED_BYTES,
    chosen: Mapping[str, AnyPlan] | None = None,
    records: Sequence[Records] | None = None,
) -> tirx.PrimFunc:
    """Build the function of a layer; from `grouped` tokens on it uses the grouped product.

    That is the one of `warp_groups`, which needs sm_90, or the one without. `shared` is what a block may have
    of shared memory. Plans are those of `records`, by default an H200's with warp groups, and none without;
    those of `chosen`, by name, come before all others (above 8 tokens plans of a pair have tiles of as many
    slots).

    Its parameters: x `x_dtype` ``[T, H]`` (float16 or float32), ids `id_dtype` ``[T, top_k]`` (those out of
    range are dropped), weights float32 ``[T, top_k]``, table int32 ``[3, E, 2]`` (projection, expert ->
    class, index in the class), the classes of gate, up and down in layout mma16x256 (codes, scales, zeros
    unless symmetric, each ``[number of experts, ...]``; a projection of one class holds all experts in
    order), the biases named by the shape, float32, in the order gate ``[E, I]``, up ``[E, I]``, down ``[E,
    H]``; and the outputs workspace uint8 ``[workspace_bytes(shape, T)]`` and y float32 ``[T, H]``.
    """
    formats = {name: [str(fmt) for fmt in getattr(shape, name)] for name in ("gate", "up", "down")}
    if records is None:
        records = [load()] if warp_groups else []
    cut, recorded = plans(shape, shared, records)
    cut |= chosen or {}
    facts = {"plans": {name: str(plan) for name, plan in cut.items()}, "recorded": recorded}
    with kernel("experts", **formats, **facts) as k:
        tokens = tirx.Var("t", "int64")
        at: dict[str, Any] = {
            "x": k.parameter("x", [tokens, shape.hidden], x_dtype),
            "ids": k.parameter("ids", [tokens, shape.top_k], id_dtype),
            "weights": k.parameter("weights", [tokens, shape.top_k], "float32"),
            "table": k.parameter("table", [3, shape.experts, 2], "int32"),
        }
        at |= declare_packed(k, shape, "gate", "up", "down")
        at |= declare_biases(k, shape, at["table"], *BIASES)
        workspace = k.bytes("workspace", workspace_bytes(shape, tokens))
        at["y"] = k.parameter("y", [tokens, shape.hidden], "float32")
        at["hit"], offset = T.address_of(workspace[0]), tirx.const(ALIGNMENT, "int64")
        for name, size in sections(shape).items():
            at[name] = T.address_of(workspace[offset])
            offset = offset + capacity_of(shape, tokens) * size
        with T.If(tokens == 1):
            with T.Then():
                one = at | {"slots": at["ids"], "shares": at["weights"]}
                gate_up, down = cut["gate_up_1"], cut["down_1"]
                assert isinstance(gate_up, Plan)
                assert isinstance(down, Plan)
                launch_gate_up(k, shape, gate_up, one, tokens, shape.top_k, id_dtype)
                launch_down(k, shape, down, one, tokens, shape.top_k, id_dtype)
            with T.Else(), T.If(tokens > 0), T.Then():
                _several(k, shape, cut, at, tokens, id_dtype, grouped, warp_groups)
    return k.finish()


def _several(
    k: Kernel,
    shape: ExpertsShape,
    cut: dict[str, AnyPlan],
    at: dict[str, Any],
    tokens: tirx.Var,
    id_dtype: str,
    grouped: int | None,
    warp_groups: bool,
) -> None:
    """Two or more tokens: by int8, by slots of 8, by tiles of slots, or the grouped product."""

    def climb(rungs: Sequence[Rung]) -> None:
        rung, above = rungs[0], rungs[1:]
        if not above:
            launch(rung)
            return
        with T.If(tokens <= rung.upper):
            with T.Then():
                launch(rung)
            with T.Else():
                climb(above)

    def launch(rung: Rung) -> None:
        gate_up, down = rung.gate_up, rung.down
        if gate_up is None or down is None:
            _grouped(k, shape, at, tokens, warp_groups)
        elif isinstance(gate_up, QuadsPlan) and isinstance(down, QuadsPlan) and rung.upper is not None:
            launch_gate_up_quads(k, shape, gate_up, at, tokens, id_dtype, rung.upper)
            launch_down_quads(k, shape, down, at, tokens, id_dtype, rung.upper)
        elif isinstance(gate_up, QuadsPlan) or isinstance(down, QuadsPlan):
            raise InternalError(f"plans {gate_up} and {down} do not go together")
        elif rung.upper == COLUMN_TOKENS:
            _few(k, shape, gate_up, down, at, tokens, id_dtype)
        else:
            _tiles(k, shape, gate_up, down, at, tokens)

    with T.If(tokens <= COLUMN_TOKENS):
        with T.Then():
            launch(Rung(COLUMN_TOKENS, cut["gate_up_8"], cut["down_8"]))
        with T.Else():
            single = all(len(set(formats)) == 1 for formats in ((*shape.gate, *shape.up), shape.down))
            climb(ladder(cut, grouped, shape.top_k / shape.experts if single else math.inf))


def _few(
    k: Kernel,
    shape: ExpertsShape,
    gate_up: SlotsPlan,
    down: SlotsPlan,
    at: dict[str, Any],
    tokens: tirx.Var,
    id_dtype: str,
) -> None:
    """2 to 8 tokens by slots."""
    few = tirx.min(tokens * shape.top_k, tirx.const(shape.experts, "int64"))
    launch_route(k, shape, at, tokens, halve=True)
    halves = at | {"x": at["images"]}
    if shape.experts <= MOST_NAMED:
        named = halves | {"slots": at["ids"]}
        launch_gate_up(k, shape, gate_up, named, tokens, few, id_dtype, routed=True)
    else:
        launch_gate_up(k, shape, gate_up, halves, tokens, few, "int32")
    launch_down(k, shape, down, halves, tokens, few, "int32")


def _tiles(
    k: Kernel, shape: ExpertsShape, gate_up: SlotsPlan, down: SlotsPlan, at: dict[str, Any], tokens: tirx.Var
) -> None:
    """More than 8 tokens: slots, or tiles of as many slots as both plans have."""
    launch_route(k, shape, at, tokens, halve=True)
    at = at | {"x": at["images"]}
    if gate_up.slots > 1:
        launch_tiles(k, shape, at, gate_up.slots)
        at["slots"] = at["tiles"]
    pairs = tokens * shape.top_k
    most = tirx.min(pairs, shape.experts + pairs // (COLUMN_TOKENS * gate_up.slots))
    launch_gate_up(k, shape, gate_up, at, tokens, most, "int32")
    launch_down(k, shape, down, at, tokens, most, "int32", many=True)


def _grouped(k: Kernel, shape: ExpertsShape, at: dict[str, Any], tokens: tirx.Var, warp_groups: bool) -> None:
    """The grouped product; with warp groups its tiles are larger where experts have more tokens."""
    if not warp_groups:
        launch_route(k, shape, at, tokens)
        launch_tiled(k, shape, at, tokens)
        return
    room = capacity_of(shape, tokens)

    def climb(tiles: Sequence[tuple[int, Tile]]) -> None:
        if not tiles:
            launch_grouped(k, shape, at, tokens, room, large_for(shape))
            return
        each, tile = tiles[0]
        with T.If(tokens <= each * shape.experts // shape.top_k):
            with T.Then():
                if tile.few and by_bytes(shape):
                    launch_bytes(k, shape, at, tokens, room)
                else:
                    launch_grouped(k, shape, at, tokens, room, tile)
            with T.Else():
                climb(tiles[1:])

    climb(list(tiles_for(shape).items()))
