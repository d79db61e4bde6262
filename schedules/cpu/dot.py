"""Dot products of u8 codes with i8 activations, by instruction family.

One line of 64 bytes holds, in its 32-bit lane ``n``, four consecutive columns of row ``n``; it is multiplied
with four activations that every lane shares, and a tile is eight such lines. A `DotFamily` adds a line to a
state and turns the state into int32 sums, exactly. `moqc.schedules.cpu.families` lists them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.pack import FOURS, Field

Columns = Callable[[int, int, int], Any]


@dataclass(frozen=True)
class DotFamily(ABC):
    """One way to multiply; `lanes` rows at a time, `token_tile` tokens for codes in registers."""

    name: str
    lanes: int
    token_tile: int
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

    @property
    def turn_columns(self) -> int:
        """Columns in a turn of the loop of one token's product, at least a group.

        128 take 2 % less time than 64 for cold 4-bit weights.
        """
        return 128

    def offset(self, wide: bool) -> int:
        """What `step` subtracts from codes; `wide` as there."""
        return 0

    @abstractmethod
    def step(self, state: Any, codes: Any, x: Any, wide: bool) -> Any:
        """Add one line: `codes` uint32xL (4 codes a lane), `x` int32xL (4 int8 a lane, all lanes equal).

        `state` is None for the first line, and a vector or a tuple of them. `wide` says that codes may exceed
        4 bits.
        """

    def start(self, count: Any) -> Any:
        """The state that goes on from int32xL sums, or from None; `finish` wants them again."""
        return count

    def finish(self, state: Any, count: Any = None) -> Any:
        """int32xL sums of a state, which started from `count`."""
        return state

    def panel_order(self, operands: list[Any]) -> list[Any]:
        """The eight lines of a tile, uint32xL each, as `panel_sums` wants them in memory."""
        return operands

    def panel_sums(
        self, line: Callable[[int], Any], columns: Columns, counts: Sequence[Any], wide: bool
    ) -> list[Any]:
        """int32xL sums of a tile for every token, on top of those in `counts` (each may be None).

        ``line(v)`` is a line in `panel_order`; ``columns(token, first, count)`` are activations of the tile,
        int8 x `count`.
        """
        states = [self.start(count) for count in counts]
        for v in range(FOURS):
            codes = line(v)
            for m in range(len(counts)):
                x = four_everywhere(partial(columns, m), v, self.lanes)
                state = self.step(states[m], codes, x, wide)
                states[m] = tuple(map(T.bind, state)) if isinstance(state, tuple) else T.bind(state)
        return [T.bind(self.finish(state, count)) for state, count in zip(states, counts, strict=True)]

    def extract(self, word: Any, field: Field) -> Any:
        """The bits of `field` of every byte of `word`, uint32xL, moved to their place in the code."""
        if field.width == 8:
            return word
        return self.move(word, field.shift - field.place, field.mask << field.place)

    @abstractmethod
    def move(self, word: Any, distance: int, mask: int) -> Any:
        """Every byte of uint32xL `word` shifted right by `distance` (left below 0), of it the bits of `mask`.

        `mask` must not ask for bits that come from another byte.
        """

    @abstractmethod
    def lookup(self, table: Sequence[int], indices: Any) -> Any:
        """``table[index]`` for every byte of uint32xL `indices`; the table has 16 bytes at most.

        The low four bits of a byte are the index; the highest must be 0, the others do not matter.
        """


def four_everywhere(columns: Callable[[int, int], Any], v: int, lanes: int) -> Any:
    """Columns 4v..4v+3 of a tile in every lane, int32xL; ``columns(first, count)`` are int8 x `count`.

    A vector of four lanes is made from 16 columns: that is an operand of ARM's products by element.
    """
    if lanes > 4:
        return T.broadcast(T.reinterpret("int32", columns(4 * v, 4)), lanes)
    whole = T.reinterpret("int32x4", columns(v // 4 * 16, 16))
    return tirx.Shuffle([whole], [tirx.const(v % 4, "int32")] * 4)


def table_vector(table: Sequence[int], lanes: int) -> Any:
    """The 16 bytes of a table as a constant uint32xL, repeated."""
    whole = [*table, *[0] * (16 - len(table))]
    words = [int.from_bytes(bytes(whole[i : i + 4]), "little") for i in range(0, 16, 4)]
    constants = [tirx.const(words[lane % 4], "uint32") for lane in range(lanes)]
    return tirx.Shuffle(constants, [tirx.const(lane, "int32") for lane in range(lanes)])


def nibbles(codes: Any, wide: bool, family: DotFamily) -> list[Any]:
    """`codes` itself, or where they may exceed 4 bits its low and its high nibbles."""
    return [family.move(codes, 0, 0x0F), family.move(codes, 4, 0x0F)] if wide else [codes]
