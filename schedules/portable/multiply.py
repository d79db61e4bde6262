"""The product every packed kernel is made of: rows of weights by a few tokens.

A work-group takes one tile of 16 rows, of one or two matrices (gate and up), and up to `TOKENS` rows of
activations. Four threads share a row, each takes every fourth block of 32 columns: it decodes 32 weights
into registers, once, and multiplies them with all tokens. The four sums meet in shared memory.

Products are in `REAL` and added up in it eight at a time; float32 takes those sums. A block's sum that
16 bits do not hold is computed again in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE
from moqc.schedules.cpu.emit import bind, ceildiv, load, loop, store, when
from moqc.schedules.portable.emit import (
    LOST,
    REAL,
    THREADS,
    barrier,
    cast,
    divide,
    local,
    modulo,
    shared,
    strided,
)
from moqc.schedules.portable.weights import Choice

TOKENS = 8
"""Rows of activations a work-group takes where there are many."""
SLICES = THREADS // ROW_TILE
"""Threads that share a row."""
_CHAIN = 8
"""Products that are added up in `REAL`."""


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
        self._weights = local(matrices * COLUMN_TILE, REAL)
        self._scales, self._total = local(matrices), local(1)
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
            self._decode(choice, 0, tile, block, number)
        first = bind(block * COLUMN_TILE)
        with loop(0, self._tokens) as token:
            place = bind(rows.place(token))
            values = [_element(rows.x, place, first, column, columns) for column in range(COLUMN_TILE)]
            reals = [bind(cast(value, REAL)) for value in values]
            for number in range(len(choices)):
                scale = load(self._scales, [number])
                scale = scale if share is None else scale * share
                total = self._dot(values, reals, number * COLUMN_TILE) * scale
                at = bind((token + number * self._tokens) * THREADS + self._thread)
                store(self._sums, [at], load(self._sums, [at]) + total)

    def _dot(self, values: list[Any], reals: list[Any], first: int) -> Any:
        """The sum of `values`, float32, which `reals` are in `REAL`, times the weights from `first` on."""
        weights = [load(self._weights, [first + column]) for column in range(COLUMN_TILE)]
        chains = [_chain(reals[at : at + _CHAIN], weights[at:]) for at in range(0, COLUMN_TILE, _CHAIN)]
        store(self._total, [0], sum(chains[1:], chains[0]))
        with when(T.call_pure_extern("int32", LOST, load(self._total, [0])) != 0):
            store(self._total, [0], _chain(values, [cast(weight, "float32") for weight in weights]))
        return load(self._total, [0])

    def _decode(self, choice: Choice, first: int, tile: Any, block: Any, number: int) -> None:
        """Decode matrix `number` from the stack that `choice` selects, of those from number `first` on."""

        def decode() -> None:
            place = (choice.index, tile, self._row, block)
            scale = choice.stacks[first].decode(*place, self._weights, number * COLUMN_TILE)
            store(self._scales, [number], scale)

        if first == len(choice.stacks) - 1:
            decode()
            return
        with T.If(choice.selected == first):
            with T.Then():
                decode()
            with T.Else():
                self._decode(choice, first + 1, tile, block, number)

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
                write(row, token, [self._output(first, number) for number in range(self._matrices)])

    def _output(self, first: Any, matrix: int) -> Any:
        at = first + matrix * self._tokens * THREADS
        parts = [load(self._sums, [at + piece * ROW_TILE]) for piece in range(SLICES)]
        return bind((parts[0] + parts[1]) + (parts[2] + parts[3]))


def _chain(values: Sequence[Any], weights: Sequence[Any]) -> Any:
    """The sum of products of as many of `weights` as there are values, as float32."""
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=False):
        total = value * weight + total
    return cast(total, "float32")


def _element(x: Any, place: Any, first: Any, column: int, columns: int) -> Any:
    """Element `first + column` of the row at `place`, 0 behind its end."""
    value = load(x, [place, first + column])
    if columns % COLUMN_TILE:
        value = T.if_then_else(first + column < columns, value, T.float32(0))
    return bind(value)


def clamped(number: Any, count: Any) -> Any:
    """`number`, at most the last of `count`: what is read but not used must exist."""
    return bind(tirx.min(number, count - 1))
