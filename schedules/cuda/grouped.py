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
from moqc.schedules.cuda.experts import Pointers, distinct, formats_of, layer_of
from moqc.schedules.cuda.plan import MULTIPROCESSORS, SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.toolchain import WARP_GROUP_THREADS

X_STAGE = 16 * 1024
"""Bytes of a stage of activations: 128 tokens x 64 columns."""
ROW_TILES = 16
"""Of a block's tile."""


def rings(formats: Sequence[Format]) -> tuple[int, int]:
    """Stages of activations and bytes of shared memory, beside two stages of weights."""
    groups = max(COLUMNS // fmt.group for fmt in formats)
    zeros = 0 if all(fmt.symmetric for fmt in formats) else groups * 16
    weights = ROW_TILES * (max(fmt.bits for fmt in formats) * 512 + groups * 32 + zeros)
    fixed = 2 * weights + 2 * X_STAGE + 1024
    stages = min((SHARED_BYTES - fixed) // X_STAGE, 8)
    if stages < 2:
        raise UserError(
            f"formats {', '.join(map(str, formats))} together do not fit the shared memory of a block"
        )
    return stages, fixed + stages * X_STAGE


def launch_grouped(
    k: Kernel, shape: ExpertsShape, at: Pointers, tokens: tirx.Var, slots: Any, capacity: Any
) -> None:
    """Both products for at most `slots` listed slots; the workspace has room for `capacity`."""
    count, room = tirx.Cast("int32", tokens), tirx.Cast("int32", capacity)
    threads = max(-(-shape.experts // 32) * 32, 256)
    k.launch(1, threads, 0, f"moqc::list_tiles<{shape.experts}>", at["slots"], at["hit"], at["tiles"])
    given = [at[name] for name in ("members", "hit", "images", "factors", "over")]
    k.launch(slots, 256, 0, f"moqc::gather<{shape.hidden}>", at["x"], count, *given, room, at["y"])
    formats = distinct(shape.gate, shape.up)
    stages, shared = rings(formats)
    types = f"moqc::Rings<{stages}, 2, {formats_of(formats)}>"
    lists = ("tiles", "hit", "images", "factors", "shares", "over", "table", "gate_bias", "up_bias", "hidden")
    arguments = [*(at[name] for name in lists), room, *at["gate"], *at["up"]]
    for again in ("false", "true"):
        function = f"moqc::gate_up_grouped<{layer_of(shape)}, {types}, {again}, "
        function += f"{formats_of(shape.gate)}, {formats_of(shape.up)}>"
        k.launch(MULTIPROCESSORS, WARP_GROUP_THREADS, shared, function, *arguments)
    formats = distinct(shape.down)
    stages, shared = rings(formats)
    types = f"moqc::Rings<{stages}, 2, {formats_of(formats)}>"
    names = ("tiles", "hit", "hidden", "shares", "members", "over", "table", "down_bias", "y")
    function = f"moqc::down_grouped<{layer_of(shape)}, {types}, {formats_of(shape.down)}>"
    k.launch(
        MULTIPROCESSORS,
        WARP_GROUP_THREADS,
        shared,
        function,
        *(at[name] for name in names),
        room,
        *at["down"],
    )
