"""Tiles of trellis formats (`moqc.quant.trellis`) unpacked into dot operands.

The line of bits ``u`` has row n in lane n: the bits of the neighbours are the line with its lanes rotated by
one and by two, so the lower two bits of 512 codes take two rotations and one XOR. A table of 16 bytes makes
values of codes.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import ROW_TILE, Format
from moqc.quant.pack import LINE, TRELLIS_FIELDS
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import Index, bind, load


def trellis_operands(codes: Any, at: list[Index], fmt: Format, half: int, family: DotFamily) -> list[Any]:
    """The eight dot operands of the tile at `at`, uint32xL: lane n has 4 values of row n, one a byte."""
    lanes = family.lanes
    whole = bind(T.reinterpret(f"uint32x{ROW_TILE}", load(codes, [*at, 0, 0], f"uint8x{LINE}")))
    own, before, earlier = (_rotated(whole, distance, half, lanes) for distance in range(3))
    middle = bind(own ^ earlier)
    words: list[Any] = [None]
    for line in range(1, fmt.bits):
        raw = load(codes, [*at, line, half * 4 * lanes], f"uint8x{4 * lanes}")
        words.append(bind(T.reinterpret(f"uint32x{lanes}", raw)))
    result = []
    for u, *rest in TRELLIS_FIELDS[fmt.bits]:
        index = family.extract(before, u) | family.extract(middle, u._replace(place=1))
        for field in rest:
            index = index | family.extract(words[field.line], field._replace(place=field.place + 1))
        direct = fmt.values == tuple(range(fmt.levels))
        result.append(bind(index if direct else family.lookup(fmt.values, index)))
    return result


def _rotated(whole: Any, distance: int, half: int, lanes: int) -> Any:
    """uint32xL: lane n of a half has row ``n - distance`` of the 16, going round."""
    if distance == 0 and lanes == ROW_TILE:
        return whole
    rows = [(half * lanes + lane - distance) % ROW_TILE for lane in range(lanes)]
    return bind(tirx.Shuffle([whole], [tirx.const(row, "int32") for row in rows]))
