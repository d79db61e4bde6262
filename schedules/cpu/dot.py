"""Dot products of u8 codes with i8 activations, by instruction family.

One line of 64 bytes holds, in its 32-bit lane ``n``, four consecutive columns of row ``n``; it is multiplied
with four activations that every lane shares, and a tile is eight such lines. A `DotFamily` adds a line to a
state and turns the state into int32 sums. All are exact:

* ``vnni512``: ``vpdpbusd`` adds four products to an int32 lane; ``vnni512-gfni`` also unpacks with GFNI,
  ``vnni512-amx`` multiplies many tokens by tiles.
* ``bw512``, ``avx2``: ``vpmaddubsw`` adds two products in int16, ``vpmaddwd`` pairs those up. Eight lines of
  codes of at most 4 bits stay below 2**15 (8 * 2 * 15 * 127 = 30480), so a tile is widened once. Wider codes
  are taken as two nibbles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.pack import Field
from moqc.schedules.cpu.emit import intrinsic, splat


@dataclass(frozen=True)
class DotFamily:
    """One way to multiply; `lanes` rows at a time, `token_tile` tokens for codes in registers."""

    name: str
    lanes: int
    token_tile: int
    affine: bool = False
    """Whether ``vgf2p8affineqb`` (GFNI) moves bits within bytes."""
    amx: bool = False
    """Whether panels are multiplied by AMX tiles (`moqc.schedules.cpu.amx`)."""

    @property
    def spare_rows(self) -> int:
        """Rows that int8 activations have after the last: tiles are read whole, whatever rows are left."""
        return 16 if self.amx else 0

    @property
    def halves(self) -> int:
        """Vectors that a 16-row line takes."""
        return 16 // self.lanes

    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """Add one line: `codes` uint32xL (4 codes a lane), `x` int32xL (4 int8 a lane, all lanes equal).

        `state` is None for the first line. `wide` says that codes exceed 4 bits.
        """
        if self.name.startswith("vnni512"):
            total = splat(0, 16, "int32") if state is None else state
            bytes_ = T.reinterpret("uint8x64", codes), T.reinterpret("int8x64", x)
            return intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, *bytes_)
        nibbles = [codes]
        if wide:
            mask = splat(0x0F0F0F0F, self.lanes, "uint32")
            nibbles = [codes & mask, (codes >> splat(4, self.lanes, "uint32")) & mask]
        products = [self._pairs(nibble, x) for nibble in nibbles]
        if state is None:
            return tuple(products)
        return tuple(total + product for total, product in zip(state, products, strict=True))

    def start(self, count: Any) -> Any:
        """The state that goes on from int32xL sums, or from None; `finish` wants them again."""
        return count if self.name.startswith("vnni512") else None

    def finish(self, state: Any, count: Any = None) -> Any:
        """int32xL sums of a state, which started from `count`."""
        if self.name.startswith("vnni512"):
            return state
        low, *high = [self._widen(total) for total in state]
        sums = low + (high[0] << splat(4, self.lanes, "int32")) if high else low
        return sums if count is None else sums + count

    def extract(self, word: Any, field: Field) -> Any:
        """The bits of `field` of every byte of `word`, uint32xL, moved to their place in the code."""
        if field.width == 8:
            return word
        return self.move(word, field.shift - field.place, field.mask << field.place)

    def move(self, word: Any, distance: int, mask: int) -> Any:
        """Every byte of uint32xL `word` shifted right by `distance` (left below 0), of it the bits of `mask`.

        `mask` must not ask for bits that come from another byte. GFNI does in one instruction what else
        takes a shift and a mask.
        """
        if self.affine and distance != 0:
            # Byte 7 - i of the matrix selects what becomes bit i.
            matrix = sum(1 << 8 * (7 - i) + i + distance for i in range(8) if mask >> i & 1)
            size, name = 4 * self.lanes, "llvm.x86.vgf2p8affineqb.512"
            constant = T.reinterpret(f"uint8x{size}", splat(matrix, size // 8, "uint64"))
            bytes_ = T.reinterpret(f"uint8x{size}", word)
            moved = intrinsic(f"uint8x{size}", name, bytes_, constant, tirx.const(0, "int8"))
            return T.reinterpret(f"uint32x{self.lanes}", moved)
        if distance > 0:
            word = word >> splat(distance, self.lanes, "uint32")
        elif distance < 0:
            word = word << splat(-distance, self.lanes, "uint32")
        return word & splat(mask * 0x01010101, self.lanes, "uint32")

    def lookup(self, table: Sequence[int], indices: Any) -> Any:
        """``table[index]`` for every byte of uint32xL `indices`; the table has 16 bytes at most.

        The low four bits of a byte are the index; the highest must be 0, the others do not matter.
        """
        name = "llvm.x86.avx512.pshuf.b.512" if self.lanes == 16 else "llvm.x86.avx2.pshuf.b"
        size = f"uint8x{4 * self.lanes}"
        whole = [*table, *[0] * (16 - len(table))]
        words = [int.from_bytes(bytes(whole[i : i + 4]), "little") for i in range(0, 16, 4)]
        constants = [tirx.const(words[lane % 4], "uint32") for lane in range(self.lanes)]
        vector = tirx.Shuffle(constants, [tirx.const(lane, "int32") for lane in range(self.lanes)])
        found = intrinsic(size, name, T.reinterpret(size, vector), T.reinterpret(size, indices))
        return T.reinterpret(f"uint32x{self.lanes}", found)

    def _pairs(self, codes: Any, x: Any) -> Any:
        name = "llvm.x86.avx512.pmaddubs.w.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"
        size = 4 * self.lanes
        operands = T.reinterpret(f"uint8x{size}", codes), T.reinterpret(f"int8x{size}", x)
        return intrinsic(f"int16x{size // 2}", name, *operands)

    def _widen(self, sums: Any) -> Any:
        name = "llvm.x86.avx512.pmaddw.d.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
        return intrinsic(f"int32x{self.lanes}", name, sums, splat(1, 2 * self.lanes, "int16"))


FAMILIES = {
    family.name: family
    for family in (
        DotFamily("vnni512-amx", 16, 8, affine=True, amx=True),
        DotFamily("vnni512-gfni", 16, 8, affine=True),
        DotFamily("vnni512", 16, 8),
        DotFamily("bw512", 16, 8),
        DotFamily("avx2", 8, 4),
    )
}
"""`moqc.targets.Target.dot` -> family."""
