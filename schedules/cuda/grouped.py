"""The grouped product for many tokens, on NVIDIA GPUs with warp groups (sm_90).

The device code is ``prefill.cu``. Five launches a layer: lists of slots (`launch_route`) and of tiles,
images of the activations, gate_up, gate_up again where hidden values were beyond float16 (it mostly returns
at once), down. Tiles of all experts and bit classes are in one launch, taken in turn by as many blocks as
there are multiprocessors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS
from moqc.schedules.cuda.emit import Kernel
from moqc.schedules.cuda.experts import Pointers
from moqc.schedules.cuda.plan import MULTIPROCESSORS, SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.templates import distinct, formats_of, layer_of
from moqc.schedules.cuda.toolchain import WARP_GROUP_THREADS

ATOM = 1024
"""Bytes of 64 columns of a slot's activations."""
WEIGHTS = {16: 104 * 1024, 4: 168 * 1024}
"""Bytes of weights on their way to a block, at most, by the slots of a tile; never less than two stages."""
ROW_TILES = 16
"""Of a block's tile."""


TILE_SLOTS, SMALL_SLOTS = 16, 4
"""Slots of a tile of tokens at most; and where experts have few tokens, so that more weights fit on their
way."""
SMALL_PAIRS = 18
"""Tokens an expert, on average, up to which tiles are small."""
GROUP, BUFFERS = 1, 2
"""Steps of 16 columns whose weights are made at a time; in how many buffers."""


def rings(formats: Sequence[Format], slots: int) -> tuple[str, int]:
    """The C++ type that says how a block uses its shared memory, and its bytes; `slots`: of a tile."""
    groups = max(COLUMNS // fmt.group for fmt in formats)
    zeros = 0 if all(fmt.symmetric for fmt in formats) else groups * 16
    unit = ROW_TILES * (max(fmt.bits for fmt in formats) * 512 + groups * 32 + zeros)
    weights, stage = min(max(WEIGHTS[slots] // unit, 2), 6), slots * ATOM
    fixed = weights * unit + 2 * stage + 1024
    stages = min((SHARED_BYTES - fixed) // stage, 8)
    if stages < 3:
        raise UserError(f"formats {', '.join(map(str, formats))} do not fit the shared memory of a block")
    numbers = f"{slots}, {GROUP}, {BUFFERS}, {stages}, {weights}"
    return f"moqc::Rings<{numbers}, {formats_of(formats)}>", fixed + stages * stage


def launch_tiles(k: Kernel, shape: ExpertsShape, at: Pointers, slots: int) -> None:
    """List tiles of up to `slots` of an expert's slots, from the lists of `launch_route`."""
    threads = max(-(-shape.experts // 32) * 32, 256)
    k.launch(
        1, threads, 0, f"moqc::list_tiles<{shape.experts}, {slots}>", at["slots"], at["hit"], at["tiles"]
    )


def launch_grouped(
    k: Kernel,
    shape: ExpertsShape,
    at: Pointers,
    tokens: tirx.Var,
    slots: Any,
    capacity: Any,
    tile: int = TILE_SLOTS,
) -> None:
    """Both products for at most `slots` listed slots; the workspace has room for `capacity`."""
    count, room = tirx.Cast("int32", tokens), tirx.Cast("int32", capacity)
    launch_tiles(k, shape, at, tile)
    given = [at[name] for name in ("members", "hit", "images", "factors", "over")]
    k.launch(slots, 256, 0, f"moqc::gather<{shape.hidden}>", at["x"], count, *given, room, at["y"])
    types, shared = rings(distinct(shape.gate, shape.up), tile)
    lists = ("tiles", "hit", "images", "factors", "shares", "over", "table", "gate_bias", "up_bias", "hidden")
    arguments = [*(at[name] for name in lists), room, *at["gate"], *at["up"]]
    for again in ("false", "true"):
        function = f"moqc::gate_up_grouped<{layer_of(shape)}, {types}, {again}, "
        function += f"{formats_of(shape.gate)}, {formats_of(shape.up)}>"
        k.launch(MULTIPROCESSORS, WARP_GROUP_THREADS, shared, function, *arguments)
    types, shared = rings(distinct(shape.down), tile)
    names = ("tiles", "hit", "hidden", "shares", "members", "over", "table", "down_bias", "y")
    function = f"moqc::down_grouped<{layer_of(shape)}, {types}, {formats_of(shape.down)}>"
    arguments = [*(at[name] for name in names), room, *at["down"]]
    k.launch(MULTIPROCESSORS, WARP_GROUP_THREADS, shared, function, *arguments)
