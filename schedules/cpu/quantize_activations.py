"""Bring activations into the form packed products read: padded to 32 columns, int8 by groups or float.

int8 follows `moqc.quant.reference.quantize_activations`: ``scale = max|x| / 127``, codes rounded half to
even. A NaN or an infinity makes the scale NaN or infinite, so it reaches the output.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import (
    Index,
    bind,
    broadcast,
    int64,
    intrinsic,
    kernel,
    load,
    loop,
    parallel,
    scratch,
    splat,
    store,
    symbol,
    unravel,
)
from moqc.schedules.cpu.tiles import Activations
from moqc.schedules.cpu.vector import shuffle

SERIAL_ELEMENTS = 4096
"""Up to so many elements are quicker done by one thread than handed to several."""


def activations_kernel(
    family: DotFamily, columns: int, *, mode: str, lead: int = 1, top_k: int = 0, rotated: int = 0
) -> tirx.PrimFunc:
    """Build the kernel that prepares ``x [*lead axes, columns]`` float32, as M rows.

    With `top_k`, row p is token ``order[p] // top_k``: the rows are gathered in the order of `route`. The
    first `rotated` blocks of 32 columns are rotated as `moqc.quant.hadamard` says.
    Parameters of the PrimFunc: x, order int32 [M] if `top_k`, then the outputs in the order of
    `Activations.declare`.
    """
    with kernel("activations", activations=mode, gather=bool(top_k), rotated=rotated) as k:
        extents = [symbol(f"d{axis}") for axis in range(lead)]
        x = k.parameter("x", [*extents, columns], "float32")
        rows: Index = symbol("m")
        order = k.parameter("order", [rows], "int32") if top_k else None
        if order is None and lead == 1:
            rows = extents[0]
        outputs = Activations.declare(k, mode, rows, columns)

        def body(row: Any) -> None:
            source = row if order is None else T.truncdiv(load(order, [row]), top_k)
            at = unravel(bind(int64(source)), extents)
            whole, rest = divmod(columns, COLUMN_TILE)
            if rotated:
                with loop(0, rotated) as tile:
                    vectors = _vectors(family, x, at, tile, COLUMN_TILE)
                    _prepare(outputs, row, tile, rotated_tile(vectors))
            with loop(rotated, whole) as tile:
                _prepare(outputs, row, tile, _vectors(family, x, at, tile, COLUMN_TILE))
            if rest:
                _prepare(outputs, row, int64(whole), _vectors(family, x, at, int64(whole), rest))

        with T.If(rows <= max(1, SERIAL_ELEMENTS // columns)):
            with T.Then(), loop(0, rows) as row:
                body(row)
            with T.Else(), parallel(rows) as row:
                body(row)
    return k.finish()


def _vectors(family: DotFamily, x: Any, at: list[Any], tile: Any, valid: int) -> list[Any]:
    """The 32 columns of a tile as float32xL values; those from `valid` on are 0."""
    lanes, first = family.lanes, tile * COLUMN_TILE
    dtype = f"float32x{lanes}"
    if valid == COLUMN_TILE:
        return [bind(load(x, [*at, first + offset], dtype)) for offset in range(0, COLUMN_TILE, lanes)]
    padded = scratch(COLUMN_TILE)
    for column in range(COLUMN_TILE):
        store(padded, [column], load(x, [*at, first + column]) if column < valid else T.float32(0))
    return [bind(load(padded, [offset], dtype)) for offset in range(0, COLUMN_TILE, lanes)]


def rotated_tile(vectors: list[Any]) -> list[Any]:
    """The 32 columns in `vectors`, float32xL each, times Sylvester's Hadamard matrix over the root of 32.

    Five rounds: sums and differences of both halves, interleaved. One round is ``P (H2 ⊗ I16)``, P a perfect
    shuffle, and the fifth power of that is H2 ⊗ H2 ⊗ H2 ⊗ H2 ⊗ H2 (Pease, 1968).
    """
    lanes, half = vectors[0].ty.dtype.lanes, len(vectors) // 2
    mixed = [[lane // 2 + lane % 2 * lanes for lane in range(start, start + lanes)] for start in (0, lanes)]
    for _ in range(COLUMN_TILE.bit_length() - 1):
        halves = zip(vectors[:half], vectors[half:], strict=True)
        pairs = [[bind(low + high), bind(low - high)] for low, high in halves]
        vectors = [bind(shuffle(pair, order)) for pair in pairs for order in mixed]
    return [bind(vector * splat(1 / math.sqrt(COLUMN_TILE), lanes)) for vector in vectors]


def _prepare(outputs: Activations, row: Any, tile: Any, vectors: list[Any]) -> None:
    """Write one tile of a row."""
    lanes = vectors[0].ty.dtype.lanes
    first = tile * COLUMN_TILE
    if not outputs.quantized:
        for number, vector in enumerate(vectors):
            store(outputs.values, [row, first + number * lanes], vector)
        return
    scale = bind(_largest(vectors) / T.float32(127))
    step = broadcast(bind(T.if_then_else(scale > 0, scale, T.float32(1))), lanes)
    sums: Any = None
    for number, vector in enumerate(vectors):
        rounded = tirx.nearbyint(vector / step).astype(f"int32x{lanes}")
        codes = bind(tirx.max(tirx.min(rounded, splat(127, lanes, "int32")), splat(-127, lanes, "int32")))
        store(outputs.values, [row, first + number * lanes], codes.astype(f"int8x{lanes}"))
        sums = codes if sums is None else sums + codes
    total = intrinsic("int32", "llvm.vector.reduce.add", sums)
    store(outputs.scales, [row, tile], scale)
    store(outputs.sums, [row, tile], scale * total.astype("float32"))


def _largest(vectors: list[Any]) -> Any:
    """max|x|, through the bits: they order like the magnitudes, and a NaN is above everything."""
    lanes = vectors[0].ty.dtype.lanes
    largest: Any = None
    for vector in vectors:
        bits = T.reinterpret(f"int32x{lanes}", vector) & splat(0x7FFFFFFF, lanes, "int32")
        largest = bits if largest is None else tirx.max(largest, bits)
    return T.reinterpret("float32", intrinsic("int32", "llvm.vector.reduce.smax", largest))
