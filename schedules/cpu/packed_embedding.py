"""Rows of a packed matrix: ``W[ids]``, dequantized."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE, Format
from moqc.quant.pack import FIELDS, FOURS, TRELLIS_FIELDS, Field
from moqc.schedules.cpu.emit import (
    bind,
    broadcast,
    int64,
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
from moqc.schedules.cpu.tiles import Weights, float_scale

SERIAL_ROWS = 4
"""Up to so many rows are quicker done by one thread than handed to several."""


def embedding_kernel(fmt: Format, columns: int, *, dtype: str, lead: int) -> tirx.PrimFunc:
    """Build the gather of rows of a matrix of `columns` columns and any number of rows.

    Parameters of the PrimFunc: ids ``[*lead axes]`` of type `dtype`, codes, scales, zeros unless symmetric,
    and the output float32 ``[*lead axes, columns]``. An id outside the matrix reads its nearest row.
    """
    with kernel("embedding", format=str(fmt)) as k:
        extents = [symbol(f"d{axis}") for axis in range(lead)]
        blocks = symbol("blocks")
        ids = k.parameter("ids", extents, dtype)
        weights = Weights.declare(k, "", fmt, blocks, columns)
        y = k.parameter("y", [*extents, columns], "float32")
        rows = extents[0]
        for extent in extents[1:]:
            rows = rows * extent

        def body(number: Any) -> None:
            at = unravel(number, extents)
            wanted = load(ids, at).astype("int64")
            row = bind(tirx.max(tirx.min(wanted, blocks * ROW_TILE - 1), int64(0)))
            whole, rest = divmod(columns, COLUMN_TILE)
            with loop(0, whole) as tile:
                _tile(weights, row, tile, COLUMN_TILE, y, at)
            if rest:
                _tile(weights, row, int64(whole), rest, y, at)

        with T.If(rows <= SERIAL_ROWS):
            with T.Then(), loop(0, rows) as number:
                body(number)
            with T.Else(), parallel(rows) as number:
                body(number)
    return k.finish()


def _tile(weights: Weights, row: Any, tile: Any, valid: int, y: Any, at: list[Any]) -> None:
    """Write the first `valid` columns of a tile of one row."""
    fmt = weights.format
    place = [T.truncdiv(row, int64(ROW_TILE)), T.truncdiv(tile * COLUMN_TILE, int64(fmt.group))]
    lane = bind(T.truncmod(row, int64(ROW_TILE)))
    stored = load(weights.scales, [*place, lane])
    scale = bind(float_scale(stored, 1) if fmt.byte_scales else stored.astype("float32"))
    zero: Any = T.float32(fmt.symmetric_zero)
    if weights.zeros is not None:
        stored = load(weights.zeros, [*place, lane]).astype("float32")
        zero = bind(stored * T.float32(fmt.zero_step))
    for v in range(FOURS):
        codes = bind(_four(weights, [place[0], tile], lane, v))
        value = (codes.astype("float32x4") - broadcast(zero, 4)) * broadcast(scale, 4)
        if 4 * v + 4 <= valid:
            store(y, [*at, tile * COLUMN_TILE + 4 * v], value)
            continue
        spill = scratch(4)
        store(spill, [0], value)
        for j in range(valid - 4 * v):
            store(y, [*at, tile * COLUMN_TILE + 4 * v + j], load(spill, [j]))


def _four(weights: Weights, at: list[Any], lane: Any, v: int) -> Any:
    """Values of columns 4v..4v+3 of a tile in row `lane` of its block, int32x4."""
    if weights.format.trellis:
        return _trellis_four(weights, at, lane, v)
    codes: Any = None
    for field in FIELDS[weights.format.bits][v]:
        part = _part(weights, at, lane, field)
        codes = part if codes is None else codes | part
    return codes


def _part(weights: Weights, at: list[Any], lane: Any, field: Field) -> Any:
    """A field of the four bytes of row `lane`, at its place in the code: int32x4."""
    raw = load(weights.codes, [*at, field.line, lane * 4], "uint8x4").astype("int32x4")
    part = (raw >> splat(field.shift, 4, "int32")) & splat(field.mask, 4, "int32")
    return part << splat(field.place, 4, "int32")


def _trellis_four(weights: Weights, at: list[Any], lane: Any, v: int) -> Any:
    """`_four` of a trellis format: bits of three rows make the code, whose value is looked up."""
    fmt = weights.format
    u, *rest = TRELLIS_FIELDS[fmt.bits][v]
    own, before, earlier = (
        _part(weights, at, T.truncmod(lane + ROW_TILE - distance, int64(ROW_TILE)), u)
        for distance in range(3)
    )
    codes = before | ((own ^ earlier) << splat(1, 4, "int32"))
    for field in rest:
        codes = codes | _part(weights, at, lane, field._replace(place=field.place + 1))
    values = splat(fmt.values[0], 4, "int32")
    # The values ascend: each is reached by adding the step to it wherever the code is not below.
    for code in range(1, fmt.levels):
        step = splat(fmt.values[code] - fmt.values[code - 1], 4, "int32")
        values = values + T.Select(codes >= splat(code, 4, "int32"), step, splat(0, 4, "int32"))
    return values
