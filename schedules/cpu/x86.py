"""Dot products of x86, by instruction family.

* `Vnni`: ``vpdpbusd`` adds four products to an int32 lane. Unpacking may use GFNI; AMX multiplies many tokens
  by tiles (`moqc.schedules.cpu.amx`).
* `MultiplyAdd`: ``vpmaddubsw`` adds two products in int16, ``vpmaddwd`` pairs those up. Eight lines of codes
  of at most 4 bits stay below 2**15 (8 * 2 * 15 * 127 = 30480), so a tile is widened once. Wider codes are
  taken as two nibbles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.dot import DotFamily, nibbles, table_vector
from moqc.schedules.cpu.emit import intrinsic, splat


@dataclass(frozen=True)
class X86Family(DotFamily):
    """What the families share."""

    affine: bool = False
    """Whether ``vgf2p8affineqb`` (GFNI) moves bits within bytes."""

    def move(self, word: Any, distance: int, mask: int) -> Any:
        """See `DotFamily`. GFNI does in one instruction what else takes a shift and a mask."""
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
        """See `DotFamily`."""
        name = "llvm.x86.avx512.pshuf.b.512" if self.lanes == 16 else "llvm.x86.avx2.pshuf.b"
        size = f"uint8x{4 * self.lanes}"
        operands = T.reinterpret(size, table_vector(table, self.lanes)), T.reinterpret(size, indices)
        return T.reinterpret(f"uint32x{self.lanes}", intrinsic(size, name, *operands))


@dataclass(frozen=True)
class Vnni(X86Family):
    """AVX-512 VNNI."""

    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """See `DotFamily`."""
        total = splat(0, 16, "int32") if state is None else state
        bytes_ = T.reinterpret("uint8x64", codes), T.reinterpret("int8x64", x)
        return intrinsic("int32x16", "llvm.x86.avx512.vpdpbusd.512", total, *bytes_)


@dataclass(frozen=True)
class MultiplyAdd(X86Family):
    """AVX2, or AVX-512 without VNNI."""

    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """See `DotFamily`."""
        products = [self._pairs(part, x) for part in nibbles(codes, wide, self)]
        if state is None:
            return tuple(products)
        return tuple(total + product for total, product in zip(state, products, strict=True))

    def start(self, count: Any) -> Any:
        """See `DotFamily`: int16 sums start anew."""
        return None

    def finish(self, state: Any, count: Any = None) -> Any:
        """See `DotFamily`."""
        low, *high = [self._widen(total) for total in state]
        sums = low + (high[0] << splat(4, self.lanes, "int32")) if high else low
        return sums if count is None else sums + count

    def _pairs(self, codes: Any, x: Any) -> Any:
        name = "llvm.x86.avx512.pmaddubs.w.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.ub.sw"
        size = 4 * self.lanes
        operands = T.reinterpret(f"uint8x{size}", codes), T.reinterpret(f"int8x{size}", x)
        return intrinsic(f"int16x{size // 2}", name, *operands)

    def _widen(self, sums: Any) -> Any:
        name = "llvm.x86.avx512.pmaddw.d.512" if self.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
        return intrinsic(f"int32x{self.lanes}", name, sums, splat(1, 2 * self.lanes, "int16"))
