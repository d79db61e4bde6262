"""The grouped product by int8, for few tokens an expert, on NVIDIA GPUs with warp groups (sm_90).

The device code is ``prefill_bytes.cu``. Three launches a layer: lists and images of the activations, gate_up,
down; hidden values need no float16, and none is beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.schedules.cuda.emit import Kernel
from moqc.schedules.cuda.experts import Pointers
from moqc.schedules.cuda.grouped import ATOM, BARRIERS, GATHERED_TOKENS, unit_bytes
from moqc.schedules.cuda.plan import MULTIPROCESSORS, SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.templates import distinct, format_of, formats_of, layer_of

GROUP = 128
"""Columns that are added up before they are scaled."""
SLOTS, STAGES = 4, 4
"""Of a tile at most; of `GROUP` columns each, on their way."""
WARP_GROUPS, ROW_TILES = 4, 16
"""That multiply, and what they have together."""
LINE = 132
"""Floats of a token's hidden values in shared memory."""
FACTS = 64
"""Bytes of a slot and `GROUP` columns: two floats for each token."""


def by_bytes(shape: ExpertsShape) -> bool:
    """Whether a layer can be multiplied so: gated, gate and up of one format, down of one."""
    first, second = distinct(shape.gate, shape.up), distinct(shape.down)
    if not shape.gate or len(first) > 1 or len(second) > 1:
        return False
    return all(fmt.group == GROUP and not fmt.trellis for fmt in (*first, *second))


def byte_rings(formats: Sequence[Format]) -> tuple[str, int]:
    """The C++ type that says how a block uses its shared memory, and its bytes."""
    each, slot = ROW_TILES * unit_bytes(formats), GROUP * 16 + FACTS
    values = SLOTS * 8 * LINE * 4 + SLOTS * slot
    fixed = STAGES * SLOTS * slot + WARP_GROUPS * SLOTS * ATOM + values + BARRIERS + WARP_GROUPS * 1024
    weights = min((SHARED_BYTES - fixed) // each, 6)
    if weights < 2:
        raise UserError(f"formats {', '.join(map(str, formats))} do not fit the shared memory of a block")
    return f"moqc::ByteRings<{SLOTS}, {STAGES}, {weights}, {formats_of(formats)}>", fixed + weights * each


def launch_bytes(k: Kernel, shape: ExpertsShape, at: Pointers, tokens: tirx.Var, capacity: Any) -> None:
    """Both products, from the router's ids; the workspace has room for `capacity` slots."""
    count, room = tirx.Cast("int32", tokens), tirx.Cast("int32", capacity)
    down, first = shape.down[0], distinct(shape.gate, shape.up)
    sizes = f"{format_of(first[0])}, {shape.experts}, {shape.top_k}, {shape.hidden}, {SLOTS}"
    made = ("members", "shares", "hit", "tiles", "images", "facts")
    given = (at["x"], at["ids"], at["weights"], count, *(at[name] for name in made), room)
    blocks = (tokens + (GATHERED_TOKENS - 1)) // GATHERED_TOKENS
    k.launch(blocks, 256, 0, f"moqc::place_and_gather_bytes<{sizes}>", *given)
    threads, layer = 128 * (WARP_GROUPS + 1), layer_of(shape)
    types, shared = byte_rings(first)
    # No factors, and no values beyond float16; facts of hidden values are where shifts would be.
    lists = ("tiles", "hit", "images", "shares", "shares", "over", "table", "gate_bias", "up_bias", "hidden")
    arguments = [*(at[name] for name in lists), at["facts"], at["shifts"], room, at["y"], count]
    function = f"moqc::gate_up_grouped<{layer}, {types}, false, {format_of(down)}, "
    function += f"{formats_of(shape.gate)}, {formats_of(shape.up)}>"
    k.launch(MULTIPROCESSORS, threads, shared, function, *arguments, *at["gate"], *at["up"])
    types, shared = byte_rings([down])
    lists = ("tiles", "hit", "hidden", "shares", "members", "over", "shifts", "table", "down_bias", "y")
    function = f"moqc::down_grouped<{layer}, {types}, {formats_of(shape.down)}>"
    k.launch(MULTIPROCESSORS, threads, shared, function, *(at[name] for name in lists), room, *at["down"])
