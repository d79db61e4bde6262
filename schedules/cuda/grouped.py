"""The grouped product for many tokens, on NVIDIA GPUs with warp groups (sm_90).

The device code is ``gather.cu`` and ``prefill.cu``. Four or five launches a layer: counts of the experts'
tokens (where they are many), lists of tiles and images of the activations, gate_up, gate_up again where
hidden values were beyond float16 (it mostly returns at once), down. Tiles of all experts and bit classes are
in one launch, taken in turn by as many blocks as there are multiprocessors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS
from moqc.schedules.cuda.emit import Kernel
from moqc.schedules.cuda.experts import Pointers
from moqc.schedules.cuda.plan import MULTIPROCESSORS, SHARED_BYTES, ExpertsShape
from moqc.schedules.cuda.templates import distinct, format_of, formats_of, layer_of

ATOM = 1024
"""Bytes of 64 columns of a slot's activations."""
FEW_SLOTS, GROUPS_SLOTS = 4, 8
"""Of tiles for so few pairs that every block counts them all, and of those that four warp groups multiply:
with few tokens it takes them to hide how long a product takes."""
MOST_SLOTS = 16
"""Of tiles whose warp groups have two blocks of 64 rows each; of larger ones they have one."""
BARRIERS = 256
"""Bytes."""
FACT = 8
"""Bytes that a warp group notes about a tile's token, of whole 128."""
COUNTED_PAIRS, GATHERED_TOKENS = 1024, 2
"""Of a block of the first launch and of the second (``gather.cu``)."""


@dataclass(frozen=True)
class Tile:
    """How a block's tile of tokens is cut.

    `slots` of an expert at most, and `weights` bytes of weights on their way (never less than two stages).
    """

    slots: int
    weights: int

    @property
    def few(self) -> bool:
        """Whether pairs are so few that every block counts them all."""
        return self.slots <= FEW_SLOTS

    @property
    def groups(self) -> int:
        """Warp groups that multiply; of four each has one block of 64 rows."""
        return 4 if self.slots <= GROUPS_SLOTS else 2

    @property
    def row_tiles(self) -> int:
        """Of 16 rows; with few tokens a warp's results are of twice as many rows."""
        return 16 if self.slots <= MOST_SLOTS else 8

    @property
    def threads(self) -> int:
        """Of a block, whose last group copies."""
        return 128 * (self.groups + 1)


TILES = {
    20: Tile(4, 104 * 1024),
    56: Tile(8, 104 * 1024),
    90: Tile(12, 120 * 1024),
    150: Tile(16, 104 * 1024),
}
"""By how many tokens an expert has, on average, at most: half of the experts have more."""
LARGE = Tile(32, 40 * 1024), Tile(24, 64 * 1024)
"""Above those where rows are long or of several formats: the first that the formats leave room for."""
LONG_ROWS = 4096
"""Columns from which on `LARGE` was faster: of shorter rows, results take much of a tile's time.
Several formats are much code, and the larger tiles' is half as much."""


def unit_bytes(formats: Sequence[Format]) -> int:
    """Bytes of a row tile's unit with scales and zeros."""
    groups = max(COLUMNS // fmt.group for fmt in formats)
    zeros = 0 if all(fmt.symmetric for fmt in formats) else groups * 16
    return max(fmt.bits for fmt in formats) * 512 + groups * 32 + zeros


def rings(formats: Sequence[Format], tile: Tile) -> tuple[str, int]:
    """The C++ type that says how a block uses its shared memory, and its bytes.

    UserError where that is too little.
    """
    unit = tile.row_tiles * unit_bytes(formats)
    stage, out = tile.slots * ATOM, min(tile.slots, MOST_SLOTS) * ATOM
    fixed = BARRIERS + tile.groups * (out + FACT * -(-tile.slots // 16) * 128)
    stages = 8 if SHARED_BYTES - fixed - 8 * stage >= max(tile.weights, 2 * unit) else 4
    weights = min((SHARED_BYTES - fixed - stages * stage) // unit, 6)
    if weights < 2:
        raise UserError(f"formats {', '.join(map(str, formats))} do not fit the shared memory of a block")
    numbers = f"{tile.slots}, {stages}, {weights}, {tile.groups}"
    return f"moqc::Rings<{numbers}, {formats_of(formats)}>", fixed + stages * stage + weights * unit


def tiles_for(shape: ExpertsShape) -> dict[int, Tile]:
    """Those of `TILES` that the layer's formats leave room for, but for the last one (`large_for`)."""
    large = large_for(shape)
    return {tokens: tile for tokens, tile in TILES.items() if tile != large and _fits(shape, tile)}


def large_for(shape: ExpertsShape) -> Tile:
    """The tile above all others."""
    long = min(shape.hidden, shape.intermediate) >= LONG_ROWS
    several = len(distinct(shape.gate, shape.up)) > 1 or len(distinct(shape.down)) > 1
    large: tuple[Tile, ...] = LARGE if long or several else ()
    return next(tile for tile in (*large, *reversed(TILES.values())) if _fits(shape, tile))


def _fits(shape: ExpertsShape, tile: Tile) -> bool:
    try:
        rings(distinct(shape.gate, shape.up), tile), rings(distinct(shape.down), tile)
    except UserError:
        return False
    return True


def launch_tiles(k: Kernel, shape: ExpertsShape, at: Pointers, slots: int) -> None:
    """List tiles of up to `slots` of an expert's slots, from the lists of `launch_route`."""
    threads = max(-(-shape.experts // 32) * 32, 256)
    k.launch(
        1, threads, 0, f"moqc::list_tiles<{shape.experts}, {slots}>", at["slots"], at["hit"], at["tiles"]
    )


def launch_grouped(
    k: Kernel, shape: ExpertsShape, at: Pointers, tokens: tirx.Var, capacity: Any, tile: Tile
) -> None:
    """Both products, from the router's ids; the workspace has room for `capacity` slots."""
    count, room = tirx.Cast("int32", tokens), tirx.Cast("int32", capacity)
    each = max(COUNTED_PAIRS // shape.top_k // GATHERED_TOKENS * GATHERED_TOKENS, GATHERED_TOKENS)
    # Sections that are written later have room for ranks and counts.
    sizes, listed = f"{shape.experts}, {shape.top_k}", (at["shifts"], at["hidden"])
    if not tile.few:
        blocks = (tokens + (each - 1)) // each
        k.launch(blocks, 512, 0, f"moqc::count_pairs<{sizes}>", at["ids"], count, *listed)
    counted = str(not tile.few).lower()
    function = f"moqc::place_and_gather<{sizes}, {shape.hidden}, {tile.slots}, {counted}>"
    made = ("members", "shares", "hit", "tiles", "images", "factors", "over")
    given = (at["x"], at["ids"], at["weights"], count, *listed, *(at[name] for name in made))
    blocks = (tokens + (GATHERED_TOKENS - 1)) // GATHERED_TOKENS
    k.launch(blocks, 256, 0, function, *given, room)
    types, shared = rings(distinct(shape.gate, shape.up), tile)
    lists = ("tiles", "hit", "images", "factors", "shares", "over", "table", "gate_bias", "up_bias", "hidden")
    # Of images by bytes (`grouped_bytes`) there would be facts.
    unused = (at["shifts"], at["shifts"])
    arguments = [*(at[name] for name in lists), *unused, room, at["y"], count, *at["gate"], *at["up"]]
    for again in ("false", "true"):
        function = f"moqc::gate_up_grouped<{layer_of(shape)}, {types}, {again}, {format_of(shape.down[0])}, "
        function += f"{formats_of(shape.gate)}, {formats_of(shape.up)}>"
        k.launch(MULTIPROCESSORS, tile.threads, shared, function, *arguments)
    types, shared = rings(distinct(shape.down), tile)
    names = ("tiles", "hit", "hidden", "shares", "members", "over", "shifts", "table", "down_bias", "y")
    function = f"moqc::down_grouped<{layer_of(shape)}, {types}, {formats_of(shape.down)}>"
    arguments = [*(at[name] for name in names), room, *at["down"]]
    k.launch(MULTIPROCESSORS, tile.threads, shared, function, *arguments)
