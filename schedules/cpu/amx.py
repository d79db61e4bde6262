"""Products with AMX: 16 tokens x 16 rows x one span of int8 columns in one instruction.

The lines of a panel are what ``tdpbsud`` takes as its second operand: line v of a tile holds, for each of 16
matrix rows, the columns 4v..4v+3. A product stops after a span, because the next one has other scales; its
int32 counts go through memory to be scaled. Every slot of a panel is multiplied with a tile of tokens while
it is loaded; two tiles of tokens at a time were not faster and took longer to compile.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import ACTIVATION_GROUP, COLUMN_TILE, ROW_TILE
from moqc.quant.pack import FOURS, LINE
from moqc.schedules.cpu.emit import bind, ceildiv, int64, load, loop, scratch, splat, store, workspace
from moqc.schedules.cpu.panel import Panel, add_scaled
from moqc.schedules.cpu.tiles import ACTIVATION_TILES, Activations

TILE_TOKENS = 16
"""Tokens of a tile register."""
BATCH = 8
"""Spans multiplied before the first is scaled: a load waits until a tile's store is in the cache."""

_COUNTS, _TOKENS, _CODES = (0, 1), 2, (3, 4)
"""Tile registers; counts and codes by slot."""
_VALUES = TILE_TOKENS * ROW_TILE

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def allow_tiles() -> None:
    """Ask Linux for the tile registers, once a process; every kernel asks, since nobody else is sure to."""
    numbers = [T.int64(value) for value in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)]
    T.evaluate(T.call_extern("int64", "syscall", *numbers))


class TileProducts:
    """Products of a panel's `slots` blocks with 16 rows of activations.

    The results are in the thread's own memory: float32 [slots, 16 rows of activations, 16 of the matrix].
    """

    def __init__(self, panel: Panel, slots: int, x: Activations) -> None:
        self._panel, self._slots, self._x = panel, slots, x
        self._counts = workspace(BATCH * slots * _VALUES, "int32")
        self._results = workspace(slots * _VALUES, "float32")

    def multiply(self, row: Any) -> None:
        """Multiply the rows ``row .. row + 15``; where there are fewer, spare ones."""
        with loop(0, self._slots * TILE_TOKENS) as m:
            store(self._results, [m * ROW_TILE], splat(0, ROW_TILE))
        with loop(0, ceildiv(self._panel.spans, BATCH)) as batch:
            begin = bind(batch * BATCH)
            size = bind(tirx.min(int64(BATCH), self._panel.spans - begin))
            with loop(0, size) as number:
                self._count(row, begin + number, number)
            for slot in range(self._slots):
                self._scale(slot, row, begin, size)

    def result(self, slot: int, m: Any) -> Any:
        """The float32x16 results of a slot for row ``row + m``."""
        return load(self._results, [(slot * TILE_TOKENS + m) * ROW_TILE], f"float32x{ROW_TILE}")

    def configure(self) -> None:
        """Set the shapes of the thread's tile registers."""
        span = self._panel.span
        shapes = {_TOKENS: (TILE_TOKENS, span * COLUMN_TILE)}
        shapes |= dict.fromkeys(_COUNTS, (TILE_TOKENS, 4 * ROW_TILE))
        shapes |= dict.fromkeys(_CODES, (span * FOURS, LINE))
        config = [1, *[0] * 63]  # palette, start row, 14 reserved, 16 x bytes a row in two bytes, 16 x rows
        for register, (rows, width) in shapes.items():
            config[16 + 2 * register], config[48 + register] = width, rows
        buffer = scratch(64, "uint8")
        for at, value in enumerate(config):
            store(buffer, [at], tirx.const(value, "uint8"))
        _instruction("ldtilecfg", T.address_of(buffer[int64(0)]))

    def release(self) -> None:
        """Give the tile registers back, so that switching threads does not save them."""
        _instruction("tilerelease")

    def _count(self, row: Any, span: Any, number: Any) -> None:
        """Write the int32 counts of a span, number `number` of its batch."""
        panel, x = self._panel, self._x
        stride = T.int64(ceildiv(panel.tiles, ACTIVATION_TILES) * ACTIVATION_GROUP)
        inputs = _address(x.values, row, span * panel.span * COLUMN_TILE)
        _instruction("tileloadd64", _register(_TOKENS), inputs, stride)
        for slot in range(self._slots):
            counts, codes = _register(_COUNTS[slot]), _register(_CODES[slot])
            line = panel.line(slot, span * panel.span, 0) * LINE
            _instruction("tileloadd64", codes, _address(panel.codes, line), T.int64(LINE))
            _instruction("tilezero", counts)
            _instruction("tdpbsud", counts, _register(_TOKENS), codes)
            at = _address(self._counts, self._at(number, slot))
            _instruction("tilestored64", counts, at, T.int64(4 * ROW_TILE))

    def _scale(self, slot: int, row: Any, begin: Any, size: Any) -> None:
        """Add the counts of a batch to the results, times scales and less zero points."""
        first = slot * _VALUES
        totals = [scratch(ROW_TILE) for _ in range(TILE_TOKENS)]
        for m, total in enumerate(totals):
            store(total, [0], load(self._results, [first + m * ROW_TILE], f"float32x{ROW_TILE}"))
        rows = [row + m for m in range(TILE_TOKENS)]
        with loop(0, size) as number:
            at = self._at(number, slot)
            counts = [
                load(self._counts, [at + m * ROW_TILE], f"int32x{ROW_TILE}") for m in range(TILE_TOKENS)
            ]
            add_scaled(self._panel, slot, self._x, rows, begin + number, 0, counts, totals)
        for m, total in enumerate(totals):
            store(self._results, [first + m * ROW_TILE], load(total, [0], f"float32x{ROW_TILE}"))

    def _at(self, number: Any, slot: int) -> Any:
        """Where the counts of a batch's span are."""
        return (number * self._slots + slot) * _VALUES


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _address(buffer: Any, *indices: Any) -> Any:
    return T.address_of(buffer[indices if len(indices) > 1 else indices[0]])


def _instruction(name: str, *arguments: Any) -> None:
    identifier = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    T.evaluate(T.call_llvm_intrin(identifier, *arguments, dtype="void"))
