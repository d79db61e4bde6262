"""Dot products of 64-bit ARM, by instruction family; a vector has four rows.

* `Dotprod`: ``sdot`` adds four products of signed bytes to an int32 lane. Codes that may exceed 7 bits are
  taken less 128.
* `I8mm`: ``usdot`` does so for unsigned codes; several tokens take ``usmmla``, which multiplies two rows of
  eight codes with two tokens.
* `Neon`: ``smlal`` adds products in int16. Eight lines of codes of at most 4 bits stay below 2**15
  (8 * 15 * 127 = 15240), so a tile is widened once. Wider codes are taken as two nibbles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from moqc.quant.pack import FOURS
from moqc.schedules.cpu.dot import Columns, DotFamily, nibbles, table_vector
from moqc.schedules.cpu.emit import intrinsic, splat
from moqc.schedules.cpu.vector import shuffle


def _bytes(vector: Any, sign: str = "u") -> Any:
    return T.reinterpret("uint8x16" if sign == "u" else "int8x16", vector)


@dataclass(frozen=True)
class NeonFamily(DotFamily):
    """What the families share: shifts are of bytes, so the uppermost bits need no mask."""

    @property
    def turn_columns(self) -> int:
        """See `DotFamily`: one group; registers run out for two of 64 (up to a fifth more instructions)."""
        return 32

    def move(self, word: Any, distance: int, mask: int) -> Any:
        """See `DotFamily`."""
        moved, left = _bytes(word), 0xFF
        if distance > 0:
            moved, left = moved >> splat(distance, 16, "uint8"), 0xFF >> distance
        elif distance < 0:
            moved, left = moved << splat(-distance, 16, "uint8"), 0xFF << -distance & 0xFF
        if left & ~mask:
            moved = moved & splat(mask, 16, "uint8")
        return T.reinterpret("uint32x4", moved)

    def lookup(self, table: Sequence[int], indices: Any) -> Any:
        """See `DotFamily`. ``tbl`` gives 0 for an index over 15."""
        index = _bytes(self.move(indices, 0, 0x0F))
        found = intrinsic("uint8x16", "llvm.aarch64.neon.tbl1", _bytes(table_vector(table, 4)), index)
        return T.reinterpret("uint32x4", found)


@dataclass(frozen=True)
class Dotprod(NeonFamily):
    """ARMv8.2 with dot products."""

    def offset(self, wide: bool) -> int:
        """See `DotFamily`."""
        return 128 if wide else 0

    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """See `DotFamily`."""
        total = splat(0, 4, "int32") if state is None else state
        if wide:  # as signed bytes, these are the codes less 128
            codes = codes ^ splat(0x80808080, 4, "uint32")
        return intrinsic("int32x4", "llvm.aarch64.neon.sdot", total, _bytes(codes, "i"), _bytes(x, "i"))


@dataclass(frozen=True)
class I8mm(NeonFamily):
    """ARMv8.6 with int8 matrix products."""

    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """See `DotFamily`."""
        total = splat(0, 4, "int32") if state is None else state
        return intrinsic("int32x4", "llvm.aarch64.neon.usdot", total, _bytes(codes), _bytes(x, "i"))

    def panel_order(self, operands: list[Any]) -> list[Any]:
        """Two rows of eight codes a vector: of each pair of lines rows 0 and 1, then 2 and 3."""
        pairs = zip(operands[::2], operands[1::2], strict=True)
        return [shuffle(pair, rows) for pair in pairs for rows in ([0, 4, 1, 5], [2, 6, 3, 7])]

    def panel_sums(
        self, line: Callable[[int], Any], columns: Columns, counts: Sequence[Any], wide: bool
    ) -> list[Any]:
        """See `DotFamily`: two tokens at a time, the last of an odd number with itself."""
        tokens = len(counts)
        pairs = [(m, min(m + 1, tokens - 1)) for m in range(0, tokens, 2)]
        sums = [[splat(0, 4, "int32")] * 2 for _ in pairs]
        for u in range(FOURS // 2):
            codes = [line(2 * u), line(2 * u + 1)]
            for total, pair in zip(sums, pairs, strict=True):
                x = T.bind(shuffle([columns(m, 8 * u, 8) for m in pair], range(16)))
                for half in range(2):
                    operands = total[half], _bytes(codes[half]), x
                    total[half] = T.bind(intrinsic("int32x4", "llvm.aarch64.neon.usmmla", *operands))
        both = [shuffle(total, lanes) for total in sums for lanes in ([0, 2, 4, 6], [1, 3, 5, 7])]
        counted = zip(both[:tokens], counts, strict=True)
        return [T.bind(total if count is None else total + count) for total, count in counted]


@dataclass(frozen=True)
class Neon(NeonFamily):
    """ARMv8.0."""

    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """See `DotFamily`."""
        signed = _bytes(x, "i")
        products = [
            _half(_bytes(part, "i"), half) * _half(signed, half)
            for part in nibbles(codes, wide, self)
            for half in range(2)
        ]
        if state is None:
            return tuple(products)
        return tuple(total + product for total, product in zip(state, products, strict=True))

    def start(self, count: Any) -> Any:
        """See `DotFamily`: int16 sums start anew."""
        return None

    def finish(self, state: Any, count: Any = None) -> Any:
        """See `DotFamily`."""
        low, *high = [self._widen(*state[at : at + 2]) for at in range(0, len(state), 2)]
        sums = low + (high[0] << splat(4, 4, "int32")) if high else low
        return sums if count is None else sums + count

    def _widen(self, first: Any, second: Any) -> Any:
        """Sums of four: int16x8 of rows 0 and 1, and of rows 2 and 3, to int32x4."""
        pairs = [intrinsic("int32x4", "llvm.aarch64.neon.saddlp", sums) for sums in (first, second)]
        return intrinsic("int32x4", "llvm.aarch64.neon.addp", *pairs)


def _half(vector: Any, half: int) -> Any:
    """Half of int8x16, as int16x8."""
    return shuffle([vector], range(8 * half, 8 * half + 8)).astype("int16x8")
