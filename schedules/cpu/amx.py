"""Products with AMX: 16 tokens x 16 rows x one span of int8 columns in one instruction.

The lines of a panel are what ``tdpbsud`` takes as its second operand: line v of a tile holds, for each of 16
matrix rows, the columns 4v..4v+3. A product stops after a span, because the next one has other scales; its
int32 counts go through memory to be scaled. While tiles multiply a span, vectors scale that `DELAY` before.
The second of the ports for 512-bit vectors then adds but does not multiply, so what counts are products: one
a value with the activations' scale, one with the weights', one with the zero point unless codes are signed.

A batch of spans is unpacked, and multiplied with several tiles of tokens before the next one: it stays in the
first-level cache, and the memory delivers what comes after it meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE
from moqc.quant.pack import LINE
from moqc.schedules.cpu.emit import (
    bind,
    broadcast,
    ceildiv,
    int64,
    load,
    loop,
    scratch,
    splat,
    store,
    when,
    workspace,
)
from moqc.schedules.cpu.panel import Panel
from moqc.schedules.cpu.plan import PanelPlan
from moqc.schedules.cpu.tiles import Activations

TILE_TOKENS = 16
"""Tokens of a tile register."""
DELAY = 3
"""Spans between the product and its scaling: a load waits until a tile's store is in the cache."""
SLOTS = 2
"""Blocks multiplied together: they share what is read of the activations."""
TILE_COLUMNS = 64
"""Columns of a tile register."""

_TOKENS, _CODES, _COUNTS = 0, 1, 1 + SLOTS
"""Tile registers: codes take one a slot, counts one a slot for the span and one for that before it."""
_VALUES = TILE_TOKENS * ROW_TILE
_HALF = TILE_TOKENS // 2

_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA = 158, 0x1023, 18


def allow_tiles() -> None:
    """Ask Linux for the tile registers, once a process; every kernel asks, since nobody else is sure to."""
    numbers = [T.int64(value) for value in (_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _XFEATURE_XTILEDATA)]
    T.evaluate(T.call_extern("int64", "syscall", *numbers))


class TileProducts:
    """Products of `slots` blocks with up to ``plan.many`` tiles of 16 rows of activations.

    The results are in the thread's own memory: float32 [tiles, slots, 16 rows of activations, 16 of the
    matrix].
    """

    def __init__(self, panel: Panel, slots: int, x: Activations, plan: PanelPlan) -> None:
        self._panel, self._slots, self._x = panel, range(slots), x
        self._counts = workspace(panel.capacity * slots * _VALUES, "int32")
        self._results = workspace(plan.many * slots * _VALUES, "float32")

    def multiply(
        self, row: Any, tiles: Any, fill: Callable[[int, Any], None], ask: Callable[[int, Any], None]
    ) -> None:
        """Multiply `tiles` tiles of activations, from `row` on; where there are fewer rows, spare ones.

        ``fill(slot, span)`` unpacks a block into the panel, from a span on; ``ask(slot, span)`` has the
        memory deliver what is a while after a span.
        """
        panel = self._panel
        with loop(0, tiles * (len(self._slots) * TILE_TOKENS)) as m:
            store(self._results, [m * ROW_TILE], splat(0, ROW_TILE))
        with loop(0, ceildiv(panel.spans, panel.capacity)) as batch:
            begin = bind(batch * panel.capacity)
            size = bind(tirx.min(int64(panel.capacity), panel.spans - begin))
            for slot in self._slots:
                fill(slot, begin)
            with loop(0, tiles) as tile:

                def ask_next(place: Any, tile: Any = tile) -> None:
                    with when(T.truncmod(begin + place, tiles) == tile):  # spread over the tiles
                        for slot in self._slots:
                            ask(slot, begin + place)

                self._add(tile, bind(row + tile * TILE_TOKENS), begin, size, ask_next)

    def result(self, slot: int, tile: Any, m: Any) -> Any:
        """The float32x16 results of a slot for row `m` of a tile."""
        return load(self._results, [self._result(slot, tile, m)], f"float32x{ROW_TILE}")

    def configure(self) -> None:
        """Set the shapes of the thread's tile registers."""
        columns = min(self._panel.span * COLUMN_TILE, TILE_COLUMNS)
        shapes = {_TOKENS: (TILE_TOKENS, columns)}
        for slot in self._slots:
            shapes[_CODES + slot] = columns // 4, LINE
            shapes |= {_counts(slot, parity): (TILE_TOKENS, 4 * ROW_TILE) for parity in range(2)}
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

    def _add(self, tile: Any, row: Any, begin: Any, size: Any, ask_next: Callable[[Any], None]) -> None:
        """Add the scaled counts of a batch to the results of a tile.

        Half of the rows while tiles multiply: totals of all would not fit the vector registers.
        """
        with self._totals(tile, 0) as totals, loop(0, (size + (DELAY + 1)) // 2) as pair:
            for parity in range(2):
                step = bind(pair * 2 + parity)
                with when(step < size):
                    self._count(row, begin + step, step, parity)
                    ask_next(step)
                with when(tirx.all(step >= 1, step <= size)):
                    self._store(step - 1, 1 - parity)
                with when(tirx.all(step >= DELAY, step < size + DELAY)):
                    self._scale(row, begin, bind(step - DELAY), totals)
        with self._totals(tile, _HALF) as totals, loop(0, size) as place:
            self._scale(row, begin, place, totals)

    @contextmanager
    def _totals(self, tile: Any, first: int) -> Iterator[dict[tuple[int, int], Any]]:
        """Half of the rows of a tile's results in registers, by slot and row, for a while."""
        rows = range(first, first + _HALF)
        totals = {(slot, m): scratch(ROW_TILE) for m in rows for slot in self._slots}
        for (slot, m), total in totals.items():
            store(total, [0], self.result(slot, tile, m))
        yield totals
        for (slot, m), total in totals.items():
            at = self._result(slot, tile, m)
            store(self._results, [at], load(total, [0], f"float32x{ROW_TILE}"))

    def _count(self, row: Any, span: Any, place: Any, parity: int) -> None:
        """Multiply the span in `place`, for all slots."""
        panel, x, tokens = self._panel, self._x, _register(_TOKENS)
        stride = T.int64(int(x.values.shape[1]))
        for slot in self._slots:
            _instruction("tilezero", _register(_counts(slot, parity)))
        for t in range(0, panel.span, TILE_COLUMNS // COLUMN_TILE):
            column = bind((span * panel.span + t) * COLUMN_TILE)
            _instruction("tileloadd64", tokens, _address(x.values, row, column), stride)
            for slot in self._slots:
                codes = _register(_CODES + slot)
                line = _address(panel.codes, panel.line(slot, place, t, 0) * LINE)
                _instruction("tileloadd64", codes, line, T.int64(LINE))
                kind = "tdpbssd" if panel.signed else "tdpbsud"
                _instruction(kind, _register(_counts(slot, parity)), tokens, codes)

    def _store(self, place: Any, parity: int) -> None:
        """Write the counts of the span in `place` to memory: a span later, when they are there."""
        for slot in self._slots:
            target = _address(self._counts, self._at(slot, place, 0))
            _instruction("tilestored64", _register(_counts(slot, parity)), target, T.int64(4 * ROW_TILE))

    def _scale(self, row: Any, begin: Any, place: Any, totals: Mapping[tuple[int, int], Any]) -> None:
        """Add the counts of the span in `place` to `totals`, times both scales and less the zero points."""
        panel, x, span, vector = self._panel, self._x, bind(begin + place), f"float32x{ROW_TILE}"
        at = [panel.at(slot, place, 0, ROW_TILE) for slot in self._slots]
        scales = [bind(load(panel.scales, [each], vector)) for each in at]
        shifts = [] if panel.signed else [bind(load(panel.shifts, [each], vector)) for each in at]
        for m in sorted({m for _, m in totals}):
            step = bind(broadcast(x.scale(row + m, span, panel.span), ROW_TILE))
            part = None if panel.signed else bind(broadcast(x.sum(row + m, span, panel.span), ROW_TILE))
            for slot in self._slots:
                count = load(self._counts, [self._at(slot, place, m)], f"int32x{ROW_TILE}")
                value = load(totals[slot, m], [0], vector) + _float(count) * step * scales[slot]
                if part is not None:
                    value = value - part * shifts[slot]
                store(totals[slot, m], [0], value)

    def _at(self, slot: int, place: Any, m: int) -> Any:
        """Where the counts of the span in `place` are."""
        return (place * len(self._slots) + slot) * _VALUES + m * ROW_TILE

    def _result(self, slot: int, tile: Any, m: Any) -> Any:
        """Where the results of a row of a tile are."""
        return (tile * len(self._slots) + slot) * _VALUES + m * ROW_TILE


def _float(counts: Any) -> Any:
    """int32x16 counts, below 2**22, as float32x16.

    Added to a number whose last place is 1, and that subtracted: two additions, which have a port that
    conversions and multiplications do not have while tiles multiply.
    """
    sums = counts + splat(0x4B400000, ROW_TILE, "int32")
    return T.reinterpret(f"float32x{ROW_TILE}", sums) - splat(1.5 * 2**23, ROW_TILE)


def _counts(slot: int, parity: int) -> int:
    return _COUNTS + parity * SLOTS + slot


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _address(buffer: Any, *indices: Any) -> Any:
    return T.address_of(buffer[indices if len(indices) > 1 else indices[0]])


def _instruction(name: str, *arguments: Any) -> None:
    identifier = T.llvm_lookup_intrinsic_id(f"llvm.x86.{name}")
    T.evaluate(T.call_llvm_intrin(identifier, *arguments, dtype="void"))
