"""The product every packed kernel is made of: rows of weights by a few tokens.

A work-group takes one tile of 16 rows, of one or two matrices (gate and up), and up to `TOKENS` rows of
activations. Four threads share a row, each takes every fourth block of 32 columns: it decodes 32 weights
into registers, once, and multiplies them with all tokens. The four sums meet in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE
from moqc.schedules.cpu.emit import bind, ceildiv, load, loop, store, when
from moqc.schedules.portable.emit import THREADS, barrier, divide, local, modulo, shared, strided
from moqc.schedules.portable.weights import Choice

TOKENS = 8
"""Rows of activations a work-group takes where there are many."""
SLICES = THREADS // ROW_TILE
"""Threads that share a row."""


@dataclass(frozen=True)
class Rows:
    """Rows of the activations `x`, float32 [T, K]: number `place(token)` for each token of the work-group."""

    x: Any
    place: Callable[[Any], Any]


class Product:
    """The sums of one work-group: of `matrices` matrices, a row tile of each, times `tokens` tokens.

    Every thread's sums are in shared memory from the start: registers cannot be indexed by a loop, and loops
    over tokens keep the code short.
    """

    def __init__(self, thread: Any, matrices: int, tokens: int) -> None:
        self._thread, self._matrices, self._tokens = thread, matrices, tokens
        self._row, self._slice = bind(modulo(thread, ROW_TILE)), bind(divide(thread, ROW_TILE))
        self._weights = local(matrices * COLUMN_TILE)
        self._sums = shared(matrices * tokens * THREADS)
        with loop(0, matrices * tokens) as number:
            store(self._sums, [number * THREADS + thread], T.float32(0))

    def add(self, tile: Any, choices: Sequence[Choice], rows: Rows, share: Any = None) -> None:
        """Add a row tile of each of `choices` times the rows, times `share` (float32) if given."""
        columns = choices[0].columns
        blocks = ceildiv(columns, COLUMN_TILE)
        with loop(0, ceildiv(blocks, SLICES)) as turn:
            block = bind(turn * SLICES + self._slice)
            if blocks % SLICES:
                with when(block < blocks):
                    self._block(tile, choices, rows, block, columns, share)
            else:
                self._block(tile, choices, rows, block, columns, share)

    def _block(
        self, tile: Any, choices: Sequence[Choice], rows: Rows, block: Any, columns: int, share: Any
    ) -> None:
        for number, choice in enumerate(choices):
            self._decode(choice, 0, tile, block, number * COLUMN_TILE)
        first = bind(block * COLUMN_TILE)
        with loop(0, self._tokens) as token:
            place = bind(rows.place(token))
            values = [_element(rows.x, place, first, column, columns) for column in range(COLUMN_TILE)]
            for number in range(len(choices)):
                total: Any = T.float32(0)
                for column, value in enumerate(values):
                    total = value * load(self._weights, [number * COLUMN_TILE + column]) + total
                total = total if share is None else total * share
                at = bind((token + number * self._tokens) * THREADS + self._thread)
                store(self._sums, [at], load(self._sums, [at]) + total)

    def _decode(self, choice: Choice, first: int, tile: Any, block: Any, place: int) -> None:
        """Decode from the stack that `choice` selects, of those from number `first` on."""
        decode = choice.stacks[first].decode
        if first == len(choice.stacks) - 1:
            decode(choice.index, tile, self._row, block, self._weights, place)
            return
        with T.If(choice.selected == first):
            with T.Then():
                decode(choice.index, tile, self._row, block, self._weights, place)
            with T.Else():
                self._decode(choice, first + 1, tile, block, place)

    def finish(self, tile: Any, rows: int, write: Callable[[Any, Any, list[Any]], None]) -> None:
        """Call `write` with (row, token, the sum of each matrix) for every row below `rows`.

        In uniform code only, as it waits for the work-group.
        """
        barrier()
        with strided(self._thread, self._tokens * ROW_TILE) as output:
            token = bind(divide(output, ROW_TILE))
            first = bind(token * THREADS + modulo(output, ROW_TILE))
            row = bind(tile * ROW_TILE + modulo(output, ROW_TILE))
            with when(row < rows):
                write(row, token, [self._total(first, number) for number in range(self._matrices)])

    def _total(self, first: Any, matrix: int) -> Any:
        at = first + matrix * self._tokens * THREADS
        parts = [load(self._sums, [at + piece * ROW_TILE]) for piece in range(SLICES)]
        return bind((parts[0] + parts[1]) + (parts[2] + parts[3]))


def _element(x: Any, place: Any, first: Any, column: int, columns: int) -> Any:
    """Element `first + column` of the row at `place`, 0 behind its end."""
    value = load(x, [place, first + column])
    if columns % COLUMN_TILE:
        value = T.if_then_else(first + column < columns, value, T.float32(0))
    return bind(value)


def clamped(number: Any, count: Any) -> Any:
    """`number`, at most the last of `count`: what is read but not used must exist."""
    return bind(tirx.min(number, count - 1))
