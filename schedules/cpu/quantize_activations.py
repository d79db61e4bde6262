"""Bring activations into the form packed products read: padded, int8 by groups or float.

int8 follows `moqc.quant.reference.quantize_activations`: ``scale = max|x| / 127``, codes rounded half to
even. A NaN or an infinity makes the scale NaN or infinite, so it reaches the output.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import ACTIVATION_GROUP, COLUMN_TILE
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import (
    Index,
    bind,
    broadcast,
    hold,
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
    workspace,
)
from moqc.schedules.cpu.tiles import ACTIVATION_TILES, Activations
from moqc.schedules.cpu.vector import common_lanes, shuffle, spread, vector_type

SERIAL_ELEMENTS = 8192
"""Up to so many elements are quicker done by one thread than handed to several."""


def activations_kernel(
    family: DotFamily, columns: int, *, mode: str, lead: int = 1, top_k: int = 0, rotated: int = 0
) -> tirx.PrimFunc:
    """Build the kernel that prepares ``x [*lead axes, columns]`` float32, as M rows.

    With `top_k`, row p is token ``order[p] // top_k``: the rows are gathered in the order of `route`. The
    first `rotated` blocks of 32 columns are rotated as `moqc.quant.hadamard` says.
    Parameters of the PrimFunc: x, order int32 [M] if `top_k`, then the outputs in the order of
    `Activations.declare`, which have `DotFamily.spare_rows` more.
    """
    with kernel("activations", activations=mode, gather=bool(top_k), rotated=rotated) as k:
        extents = [symbol(f"d{axis}") for axis in range(lead)]
        x = k.parameter("x", [*extents, columns], "float32")
        rows: Index = symbol("m") if top_k else functools.reduce(operator.mul, extents)
        order = k.parameter("order", [rows], "int32") if top_k else None
        outputs = Activations.declare(k, mode, symbol("rows"), columns)

        def write(row: Any, source: Any) -> None:
            at = unravel(source, extents)
            for begin, end, valid, turned in _segments(columns, rotated):
                with loop(begin, end) as group:
                    tiles = _vectors(family, x, at, group, valid)
                    _prepare(outputs, row, group, [*map(rotated_tile, tiles[:turned]), *tiles[turned:]])

        def each(count: Any, work: Callable[[Any], None]) -> None:
            with T.If(count <= max(1, SERIAL_ELEMENTS // columns)):
                with T.Then(), loop(0, count) as number:
                    work(number)
                with T.Else(), parallel(count) as number:
                    work(number)

        if order is None:
            each(rows, lambda row: write(row, row))
        else:
            _gather(outputs, extents[0], top_k, order, write, each)
    return k.finish()


def _gather(
    outputs: Activations,
    tokens: Any,
    top_k: int,
    order: Any,
    write: Callable[[Any, Any], None],
    each: Callable[[Any, Callable[[Any], None]], None],
) -> None:
    """Prepare every token once, in the row of its first pair, and copy it to those of the others."""
    with T.If(tokens == 1):
        with T.Then():
            write(int64(0), int64(0))
            with loop(1, top_k) as row:
                _repeat(outputs, int64(0), row)
        with T.Else():
            rows = workspace(tokens * top_k, "int64")  # pair -> its row
            with loop(0, tokens * top_k) as row:
                store(rows, [load(order, [row])], row)

            def token_rows(token: Any) -> None:
                first = bind(load(rows, [token * top_k]))
                write(first, token)
                with loop(1, top_k) as slot:
                    _repeat(outputs, first, bind(load(rows, [token * top_k + slot])))

            each(tokens, token_rows)


def _repeat(outputs: Activations, source: Any, row: Any) -> None:
    """Copy row `source` to `row`."""
    for buffer in (outputs.values, outputs.scales, outputs.sums, outputs.tile_sums):
        if buffer is not None:
            columns = int(buffer.shape[1])
            lanes = common_lanes(64 if str(buffer.dtype) == "int8" else 16, columns)
            with loop(0, columns // lanes) as step:
                value = load(buffer, [source, step * lanes], vector_type(lanes, str(buffer.dtype)))
                store(buffer, [row, step * lanes], value)


def _segments(columns: int, rotated: int) -> list[tuple[int, int, int, int]]:
    """Runs of groups that are prepared alike: the first, the one after the last, columns, tiles to rotate."""
    whole, rest = divmod(columns, ACTIVATION_GROUP)
    turned, odd = divmod(rotated, ACTIVATION_TILES)
    runs = [(0, turned, ACTIVATION_GROUP, ACTIVATION_TILES)]
    if odd:
        runs.append((turned, turned + 1, min(ACTIVATION_GROUP, columns - turned * ACTIVATION_GROUP), odd))
    plain = turned + bool(odd)
    runs.append((plain, whole, ACTIVATION_GROUP, 0))
    if rest and plain <= whole:
        runs.append((whole, whole + 1, rest, 0))
    return [run for run in runs if run[0] < run[1]]


def _vectors(family: DotFamily, x: Any, at: list[Any], group: Any, valid: int) -> list[list[Any]]:
    """The first `valid` columns of a group by tiles, each as float32xL values; the rest is 0."""
    tiles = []
    for column in range(0, valid, COLUMN_TILE):
        first = group * ACTIVATION_GROUP + column
        if valid - column >= COLUMN_TILE:
            tiles.append(_split(family, x, at, first))
            continue
        padded = scratch(COLUMN_TILE)
        for offset in range(COLUMN_TILE):
            value = load(x, [*at, first + offset]) if column + offset < valid else T.float32(0)
            store(padded, [offset], value)
        tiles.append(_split(family, padded, [], 0))
    return tiles


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
        vectors = [hold(shuffle(pair, order)) for pair in pairs for order in mixed]
    return [bind(vector * splat(1 / math.sqrt(COLUMN_TILE), lanes)) for vector in vectors]


def _split(family: DotFamily, buffer: Any, lead: list[Any], first: Any) -> list[Any]:
    """The tile from column `first` on, as values of the family's lanes."""
    offsets = range(0, COLUMN_TILE, family.lanes)
    return [bind(load(buffer, [*lead, first + offset], f"float32x{family.lanes}")) for offset in offsets]


def _prepare(outputs: Activations, row: Any, group: Any, tiles: list[list[Any]]) -> None:
    """Write one group of a row."""
    lanes = tiles[0][0].ty.dtype.lanes
    if not outputs.quantized:
        for t, vectors in enumerate(tiles):
            for number, vector in enumerate(vectors):
                column = group * ACTIVATION_GROUP + t * COLUMN_TILE + number * lanes
                store(outputs.values, [row, column], vector)
        return
    scale = bind(largest([vector for vectors in tiles for vector in vectors]) / T.float32(127))
    step = broadcast(bind(T.if_then_else(scale > 0, scale, T.float32(1))), lanes)
    total: Any = None
    for t, vectors in enumerate(tiles):
        count = _write_codes(outputs, row, group * ACTIVATION_TILES + t, vectors, scale, step)
        total = count if total is None else total + count
    for t in range(len(tiles), ACTIVATION_TILES):
        tile = group * ACTIVATION_TILES + t
        store(outputs.values, [row, tile * COLUMN_TILE], splat(0, COLUMN_TILE, "int8"))
        store(outputs.tile_sums, [row, tile], T.float32(0))
    store(outputs.scales, [row, group], scale)
    store(outputs.sums, [row, group], scale * total.astype("float32"))


def _write_codes(outputs: Activations, row: Any, tile: Any, vectors: list[Any], scale: Any, step: Any) -> Any:
    """Write a tile's codes and their sum; the sum of the codes, int32."""
    lanes = vectors[0].ty.dtype.lanes
    sums: Any = None
    for number, vector in enumerate(vectors):
        rounded = tirx.nearbyint(vector / step).astype(f"int32x{lanes}")
        codes = bind(tirx.max(tirx.min(rounded, splat(127, lanes, "int32")), splat(-127, lanes, "int32")))
        store(outputs.values, [row, tile * COLUMN_TILE + number * lanes], codes.astype(f"int8x{lanes}"))
        sums = codes if sums is None else sums + codes
    count = bind(intrinsic("int32", "llvm.vector.reduce.add", sums))
    store(outputs.tile_sums, [row, tile], scale * count.astype("float32"))
    return count


def largest(vectors: list[Any]) -> Any:
    """max|x|, through the bits: they order like the magnitudes, and a NaN is above everything."""
    lanes = vectors[0].ty.dtype.lanes
    found: Any = None
    for vector in vectors:
        bits = T.reinterpret(vector_type(lanes, "int32"), vector) & spread(0x7FFFFFFF, lanes, "int32")
        found = bits if found is None else tirx.max(found, bits)
    whole = found if lanes == 1 else intrinsic("int32", "llvm.vector.reduce.smax", found)
    return T.reinterpret("float32", whole)
