"""Products with AMX: 16 tokens x 16 rows x one span of int8 columns in one instruction.

The lines of a panel are what ``tdpbsud`` takes as its second operand: line v of a tile holds, for each of 16
matrix rows, the columns 4v..4v+3. A product stops after a span, because the next one has other scales; its
int32 counts go through memory to be scaled. While tiles multiply a span, vectors scale that `DELAY` before:
63 cycles a product on a Sapphire Rapids where one after the other takes 80 to 100.

A batch of spans is unpacked, and multiplied with several tiles of tokens before the next one: it stays in the
first-level cache, and the memory delivers what comes after it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import ACTIVATION_GROUP, COLUMN_TILE, ROW_TILE
from moqc.quant.pack import FOURS, LINE
from moqc.schedules.cpu.emit import (
    bind,
    ceildiv,
    int64,
    load,
    loop,
    prefetch,
    scratch,
    splat,
    store,
    when,
    workspace,
)
from moqc.schedules.cpu.panel import Panel, add_scaled
from moqc.schedules.cpu.plan import PanelPlan
from moqc.schedules.cpu.tiles import ACTIVATION_TILES, Activations

TILE_TOKENS = 16
"""Tokens of a tile register."""
DELAY = 2
"""Spans between the product and its scaling: a load waits until a tile's store is in the cache."""

_COUNTS, _TOKENS, _CODES = 0, 1, 2
"""Tile registers."""
_VALUES = TILE_TOKENS * ROW_TILE

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def allow_tiles() -> None:
    """Ask Linux for the tile registers, once a process; every kernel asks, since nobody else is sure to."""
    numbers = [T.int64(value) for value in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)]
    T.evaluate(T.call_extern("int64", "syscall", *numbers))


class TileProducts:
    """Products of `slots` blocks with up to ``plan.many`` tiles of 16 rows of activations.

    ``fill(slot, span)`` unpacks a block into the `panel`, from a span on; ``ask(slot, span)`` has the memory
    deliver what is a while after a span. The results are in the thread's own memory: float32 [tiles, slots,
    16 rows of activations, 16 of the matrix].
    """

    def __init__(
        self,
        panel: Panel,
        slots: int,
        x: Activations,
        plan: PanelPlan,
        fill: Callable[[int, Any], None],
        ask: Callable[[int, Any], None],
    ) -> None:
        self._panel, self._slots, self._x, self._fill, self._ask = panel, slots, x, fill, ask
        self._counts = workspace(2 * DELAY * _VALUES, "int32")
        self._results = workspace(plan.many * slots * _VALUES, "float32")

    def multiply(self, row: Any, tiles: Any) -> None:
        """Multiply `tiles` tiles of activations, from `row` on; where there are fewer rows, spare ones."""
        panel = self._panel
        with loop(0, tiles * (self._slots * TILE_TOKENS)) as m:
            store(self._results, [m * ROW_TILE], splat(0, ROW_TILE))
        with loop(0, ceildiv(panel.spans, panel.capacity)) as batch:
            begin = bind(batch * panel.capacity)
            size = bind(tirx.min(int64(panel.capacity), panel.spans - begin))
            for slot in range(self._slots):
                self._fill(slot, begin)
            with loop(0, tiles) as tile:
                first = bind(row + tile * TILE_TOKENS)
                for slot in range(self._slots):
                    self._add(slot, tile, first, begin, size)

    def result(self, slot: int, tile: Any, m: Any) -> Any:
        """The float32x16 results of a slot for row `m` of a tile."""
        return load(self._results, [self._result(slot, tile) + m * ROW_TILE], f"float32x{ROW_TILE}")

    def configure(self) -> None:
        """Set the shapes of the thread's tile registers."""
        span = self._panel.span
        shapes = {
            _TOKENS: (TILE_TOKENS, span * COLUMN_TILE),
            _COUNTS: (TILE_TOKENS, 4 * ROW_TILE),
            _CODES: (span * FOURS, LINE),
        }
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

    def _add(self, slot: int, tile: Any, row: Any, begin: Any, size: Any) -> None:
        """Add the products of a batch to the results, times scales and less zero points."""
        first = bind(self._result(slot, tile))
        totals = [scratch(ROW_TILE) for _ in range(TILE_TOKENS)]
        for m, total in enumerate(totals):
            store(total, [0], load(self._results, [first + m * ROW_TILE], f"float32x{ROW_TILE}"))
        with loop(0, size + DELAY) as step:
            with when(step < size):
                self._count(slot, row, begin + step, step)
                with when(tile == 0):
                    self._ask(slot, begin + step)
            with when(step >= DELAY):
                place = bind(step - DELAY)
                self._scale(slot, [row + m for m in range(TILE_TOKENS)], begin + place, place, totals)
        for m, total in enumerate(totals):
            store(self._results, [first + m * ROW_TILE], load(total, [0], f"float32x{ROW_TILE}"))

    def _count(self, slot: int, row: Any, span: Any, place: Any) -> None:
        """Write the int32 counts of the span in `place`."""
        panel, x = self._panel, self._x
        stride = T.int64(ceildiv(panel.tiles, ACTIVATION_TILES) * ACTIVATION_GROUP)
        counts, tokens, codes = (_register(number) for number in (_COUNTS, _TOKENS, _CODES))
        inputs = _address(x.values, row, span * panel.span * COLUMN_TILE)
        _instruction("tileloadd64", tokens, inputs, stride)
        _instruction(
            "tileloadd64", codes, _address(panel.codes, panel.line(slot, place, 0, 0) * LINE), T.int64(LINE)
        )
        if slot == 0:  # the next tile's rows: 15 % of the time at 512 tokens
            for m in range(TILE_TOKENS):
                prefetch(x.values, [row + TILE_TOKENS + m, span * panel.span * COLUMN_TILE])
        _instruction("tilezero", counts)
        _instruction("tdpbsud", counts, tokens, codes)
        _instruction("tilestored64", counts, _address(self._counts, self._at(place)), T.int64(4 * ROW_TILE))

    def _scale(self, slot: int, rows: Sequence[Any], span: Any, place: Any, totals: Sequence[Any]) -> None:
        """Add the scaled counts of the span in `place` to `totals`."""
        at = bind(self._at(place))
        counts = [load(self._counts, [at + m * ROW_TILE], f"int32x{ROW_TILE}") for m in range(TILE_TOKENS)]
        add_scaled(self._panel, slot, self._x, rows, (span, place), 0, counts, totals)

    def _at(self, place: Any) -> Any:
        """Where the counts of the span in `place` are, for a while."""
        return T.bitwise_and(place, int64(2 * DELAY - 1)) * _VALUES

    def _result(self, slot: int, tile: Any) -> Any:
        """Where the results of a tile are."""
        return (tile * self._slots + slot) * _VALUES


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _address(buffer: Any, *indices: Any) -> Any:
    return T.address_of(buffer[indices if len(indices) > 1 else indices[0]])


def _instruction(name: str, *arguments: Any) -> None:
    identifier = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    T.evaluate(T.call_llvm_intrin(identifier, *arguments, dtype="void"))
