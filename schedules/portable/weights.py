"""Packed matrices of layout ``interleaved16`` in a buffer of 32-bit words, and how a thread decodes them.

A tile of 16 rows x 32 columns of ``bits``-bit codes is ``bits`` lines of 16 words, a row's in each: 16
threads that take a row each read whole cache lines, and a weight costs ``bits / 32`` loads.

The tensors of one operator lie one after the other in one buffer: WebGPU allows eight storage buffers a
shader. Stacked matrices of a format are all their codes, then all scales, then all zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from tvm import tirx

from moqc.errors import UserError
from moqc.quant.formats import COLUMN_TILE, ROW_TILE, Format
from moqc.quant.pack import BYTE_SCALE_SHIFT, FIELDS, FOURS, packed_shapes
from moqc.schedules.cpu.emit import Index, bind, ceildiv, int64, load, store
from moqc.schedules.portable.emit import cast, divide, half, modulo


def check_format(format: Format) -> None:
    """Raise UserError for a format that these kernels cannot read."""
    if format.trellis or format.simulated:
        raise UserError(
            f"format {format}: the OpenCL and WebGPU kernels read int formats of 1, 2, 3, 4 and 8 bits"
        )


@dataclass(frozen=True)
class Stack:
    """`count` matrices of one format and shape, from word `base` of buffer `words` on."""

    words: Any
    format: Format
    rows: int
    columns: int
    base: Index
    count: Index

    @property
    def row_tiles(self) -> int:
        """Tiles of 16 rows in a matrix."""
        return ceildiv(self.rows, ROW_TILE)

    @property
    def end(self) -> Any:
        """The first word behind the stack."""
        return int64(self.base) + int64(self.count) * stack_words(self.format, self.rows, self.columns)

    def decode(self, index: Any, tile: Any, row: Any, block: Any, out: Any, first: int) -> Any:
        """Write 32 weights of matrix `index` to ``out[first:]``: a row of a tile, a block of columns.

        They lie between -1 and 1, far from what 16 bits do not hold: weights divided by the scale, float32,
        that is returned.
        """
        dtype, unit = str(out.dtype), 0.5**self.format.bits
        scale, zero = self._scale(index, tile, row, block)
        offset = bind(cast(zero * tirx.const(-unit, "float32"), dtype))
        at = (index * self.row_tiles + tile) * ceildiv(self.columns, COLUMN_TILE) + block
        at = bind(int64(self.base) + at * (self.format.bits * ROW_TILE) + row)
        lines = [bind(self._word(at + line * ROW_TILE)) for line in range(self.format.bits)]
        for four in range(FOURS):
            for j in range(4):
                code: Any = None
                for field in FIELDS[self.format.bits][four]:
                    part = _bits(lines[field.line], field.shift + 8 * j, field.mask)
                    part = part << field.place if field.place else part
                    code = part if code is None else code | part
                store(out, [first + 4 * four + j], tirx.Cast(dtype, code) * tirx.const(unit, dtype) + offset)
        return bind(scale * tirx.const(1 / unit, "float32"))

    def _scale(self, index: Any, tile: Any, row: Any, block: Any) -> tuple[Any, Any]:
        """The group's scale, and its zero point in codes."""
        groups, codes = self.format.groups(self.columns), _words(self.format, self.rows, self.columns)
        group = divide(block, self.format.group // COLUMN_TILE)
        place = bind(((index * self.row_tiles + tile) * groups + group) * ROW_TILE + row)
        scales = int64(self.base) + int64(self.count) * codes[0]
        if self.format.byte_scales:
            scale = bind(half(self._byte(scales, place) << BYTE_SCALE_SHIFT, tirx.const(0, "uint32")))
        else:
            word = self._word(scales + divide(place, 2))
            scale = bind(half(word, tirx.Cast("uint32", modulo(place, 2))))
        if self.format.symmetric:
            return scale, tirx.const(self.format.symmetric_zero, "float32")
        zeros = scales + int64(self.count) * codes[1]
        zero = tirx.Cast("float32", self._byte(zeros, place))
        return scale, zero * tirx.const(self.format.zero_step, "float32")

    def _byte(self, base: Any, place: Any) -> Any:
        shift = tirx.Cast("uint32", modulo(place, 4)) * 8
        return (self._word(base + divide(place, 4)) >> shift) & 255

    def _word(self, at: Any) -> Any:
        return load(self.words, [at])


def _bits(word: Any, shift: int, mask: int) -> Any:
    shifted = word >> shift if shift else word
    return shifted & mask


def _words(format: Format, rows: int, columns: int) -> tuple[int, int, int]:
    """Words of the codes, scales and zeros of one matrix."""
    codes, groups = packed_shapes(format, rows, columns)
    scales = prod(groups) // (4 if format.byte_scales else 2)
    return prod(codes) // 4, scales, 0 if format.symmetric else prod(groups) // 4


def stack_words(format: Format, rows: int, columns: int) -> int:
    """Words that a matrix of a stack takes."""
    return sum(_words(format, rows, columns))


@dataclass(frozen=True)
class Choice:
    """One matrix of a projection: of stack number `selected`, where there are several, number `index`."""

    stacks: tuple[Stack, ...]
    selected: Any
    index: Any

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.stacks[0].columns
