"""The grouped product for many tokens, on NVIDIA GPUs without warp groups (sm_80 to sm_89).

The device code is ``prefill_mma.cu``. Launches as in `grouped`: lists of slots and of tiles, float16 copies
of the activations, gate_up, gate_up again where hidden values were beyond float16, down.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from moqc.quant.pack_mma import COLUMNS
from moqc.schedules.cuda.emit import Kernel
from moqc.schedules.cuda.experts import Pointers
from moqc.schedules.cuda.grouped import launch_tiles
from moqc.schedules.cuda.plan import COLUMN_TOKENS, MULTIPROCESSORS, ExpertsShape
from moqc.schedules.cuda.templates import distinct, formats_of, layer_of

WARPS, TILE_SLOTS = 8, 8
"""Of a block; slots of a tile of tokens at most."""
STAGED_BYTES = 2 * TILE_SLOTS * COLUMN_TOKENS * (COLUMNS + 8) * 2
"""Two units of a tile's activations."""


def launch_tiled(k: Kernel, shape: ExpertsShape, at: Pointers, tokens: tirx.Var) -> None:
    """Both products for the listed slots."""
    launch_tiles(k, shape, at, TILE_SLOTS)
    given = [at[name] for name in ("hit", "images", "factors", "over", "y")]
    k.launch(tokens, 256, 0, f"moqc::halve<{shape.hidden}>", at["x"], *given)
    first = ("tiles", "hit", "images", "factors", "shares", "members", "over", "table")
    arguments = [at[name] for name in (*first, "gate_bias", "up_bias", "hidden")]
    lists = ", ".join(map(formats_of, (shape.gate, shape.up, distinct(shape.gate, shape.up))))
    for again in ("false", "true"):
        function = f"moqc::gate_up_tiled<{layer_of(shape)}, {again}, {lists}>"
        _launch(k, function, *arguments, *at["gate"], *at["up"])
    names = ("tiles", "hit", "hidden", "shares", "members", "over", "table", "down_bias", "y")
    lists = f"{formats_of(shape.down)}, {formats_of(distinct(shape.down))}"
    function = f"moqc::down_tiled<{layer_of(shape)}, {lists}>"
    _launch(k, function, *(at[name] for name in names), *at["down"])


def _launch(k: Kernel, function: str, *arguments: Any) -> None:
    k.launch(2 * MULTIPROCESSORS, 32 * WARPS, STAGED_BYTES, function, *arguments)
