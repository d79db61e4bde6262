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
from moqc.quant.pack import FOURS, LINE
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import Index, bind, load, splat


def trellis_operands(codes: Any, at: list[Index], fmt: Format, half: int, family: DotFamily) -> list[Any]:
    """The eight dot operands of the tile at `at`, uint32xL: lane n has 4 values of row n, one a byte.

    Operands v and v + 4 are made together: their codes are the nibbles of a byte.
    """
    lanes = family.lanes
    whole = bind(T.reinterpret(f"uint32x{ROW_TILE}", load(codes, [*at, 0, 0], f"uint8x{LINE}")))
    own, before, earlier = (_rotated(whole, distance, half, lanes) for distance in range(3))
    middle = bind(own ^ earlier)
    high: list[Any] = []
    for line in range(1, fmt.bits):
        raw = load(codes, [*at, line, half * 4 * lanes], f"uint8x{4 * lanes}")
        high.append(bind(T.reinterpret(f"uint32x{lanes}", raw)))
    pairs = []
    for v in range(FOURS // 2):
        nibbles = family.move(before, v, 0x11) | family.move(middle, v - 1, 0x22)
        if fmt.bits == 2:
            nibbles = nibbles | family.move(high[0], v - 2, 0x44)
        elif fmt.bits == 3:
            nibbles = nibbles | family.move(high[v // 2], v % 2 * 2 - 2, 0xCC)
        pairs.append(_values(bind(nibbles), fmt, family))
    return [bind(pair[position]) for position in range(2) for pair in pairs]


def _values(nibbles: Any, fmt: Format, family: DotFamily) -> tuple[Any, Any]:
    """The values of the codes in the low and in the high nibbles."""
    if fmt.bits == 1:
        return family.move(nibbles, 0, 0x0F), family.move(nibbles, 4, 0x0F)
    if fmt.bits == 2:  # the highest bits of the nibbles are 0, also those that a shift brings from elsewhere
        shifted = nibbles >> splat(4, family.lanes, "uint32")
        return family.lookup(fmt.values, nibbles), family.lookup(fmt.values, shifted)
    low, high = family.move(nibbles, 0, 0x0F), family.move(nibbles, 4, 0x0F)
    return family.lookup(fmt.values, low), family.lookup(fmt.values, high)


def _rotated(whole: Any, distance: int, half: int, lanes: int) -> Any:
    """uint32xL: lane n of a half has row ``n - distance`` of the 16, going round."""
    if distance == 0 and lanes == ROW_TILE:
        return whole
    rows = [(half * lanes + lane - distance) % ROW_TILE for lane in range(lanes)]
    return bind(tirx.Shuffle([whole], [tirx.const(row, "int32") for row in rows]))
