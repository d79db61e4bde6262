"""One experts block with packed weights of several formats, for any number of tokens.

Few tokens: a work-group takes a row tile of one (token, expert) pair. Many: `route` sorts the pairs by expert
and cuts each expert's into tiles of `TOKENS`, so that weights are decoded once for all of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.hadamard import BLOCK
from moqc.schedules.activations import activation_expr
from moqc.schedules.cpu.emit import Kernel, bind, int64, kernel, load, loop, store, symbol, when
from moqc.schedules.experts import ExpertsLayer
from moqc.schedules.portable.emit import barrier, divide, each, groups, modulo, shared, strided
from moqc.schedules.portable.multiply import TOKENS, Product, Rows, clamped
from moqc.schedules.portable.weights import Choice, Stack, check_format

FEW_TOKENS = 4
"""Up to so many tokens are not sorted: they rarely share experts."""
_TILE = 3
"""Numbers of a tile in the routing tensor: expert (-1: no more tiles), first pair, number of pairs."""
_PLACES = {"gate": 0, "up": 1, "down": 2}


@dataclass(frozen=True)
class ExpertsShape(ExpertsLayer):
    """`rotated` blocks of 32 hidden columns are rotated before down."""

    rotated: int = 0

    def tiles(self, pairs: Any) -> Any:
        """The most tiles that `pairs` pairs can take."""
        return divide(pairs, TOKENS) + self.experts

    def routing(self, pairs: Any) -> Any:
        """Elements of the routing tensor."""
        return pairs + self.tiles(pairs) * _TILE


class _Buffers:
    """The parameters, in order: see `experts_function`."""

    def __init__(self, k: Kernel, shape: ExpertsShape, dtype: str) -> None:
        self.tokens = tokens = symbol("t")
        self.pairs = tokens * shape.top_k
        self.x = k.parameter("x", [tokens, shape.hidden], "float32")
        self.ids = k.parameter("ids", [tokens, shape.top_k], dtype)
        self.weights = k.parameter("weights", [tokens, shape.top_k], "float32")
        self.table = k.parameter("table", [3, shape.experts, 2], "int32")
        self.words = {
            name: k.parameter(f"{name}_words", [symbol(f"{name}_words")], "uint32")
            for name in _PLACES
            if getattr(shape, name)
        }
        rows = {"gate_bias": shape.intermediate, "up_bias": shape.intermediate, "down_bias": shape.hidden}
        self.biases = {
            name: k.parameter(name, [shape.experts, rows[name]], "float32") for name in shape.biases
        }
        self.stacks = {name: self._stacks(shape, name) for name in self.words}
        self.routing = k.parameter("routing", [shape.routing(self.pairs)], "int32")
        self.inner = k.parameter("inner", [self.pairs, shape.intermediate], "float32")
        self.partial = k.parameter("partial", [self.pairs, shape.hidden], "float32")
        self.y = k.parameter("y", [tokens, shape.hidden], "float32")

    def _stacks(self, shape: ExpertsShape, name: str) -> tuple[Stack, ...]:
        """The classes of a projection: their counts are parameters too, so that layers share kernels."""
        rows, columns = shape.intermediate, shape.hidden
        if name == "down":
            rows, columns = columns, rows
        stacks: list[Stack] = []
        for number, format in enumerate(getattr(shape, name)):
            count = tirx.Var(f"{name}_count_{number}", "int64")
            T.arg(count.name, count)
            base = stacks[-1].end if stacks else 0
            stacks.append(Stack(self.words[name], format, rows, columns, base, count))
        return tuple(stacks)

    def choice(self, name: str, expert: Any) -> Choice:
        """The matrix of an expert."""
        selected, index = (load(self.table, [_PLACES[name], expert, column]) for column in (0, 1))
        return Choice(self.stacks[name], bind(selected), bind(tirx.Cast("int64", index)))

    def biased(self, name: str, expert: Any, row: Any, value: Any) -> Any:
        """`value` plus the bias of a projection's row, if there is one."""
        bias = self.biases.get(f"{name}_bias")
        return value if bias is None else bind(value + load(bias, [expert, row]))


def experts_function(shape: ExpertsShape, dtype: str) -> tirx.PrimFunc:
    """Build the function of a layer.

    Its parameters: x float32 ``[T, H]``, ids `dtype` ``[T, k]`` (those out of range are dropped), weights
    float32 ``[T, k]``, table int32 ``[3, E, 2]`` (projection, expert -> class, index in the class), the words
    of gate (if any), up and down (their classes as `Stack`s, one after the other), the biases named by the
    shape (gate and up ``[E, I]``, down ``[E, H]``), the number of matrices of each class (int64), and the
    outputs: routing int32, inner ``[T * k, I]`` and partial ``[T * k, H]``, which nobody reads, and y
    ``[T, H]``.
    """
    for format in (*shape.gate, *shape.up, *shape.down):
        check_format(format)
    formats = {name: [str(format) for format in getattr(shape, name)] for name in _PLACES}
    with kernel("experts", **formats) as k:
        at = _Buffers(k, shape, dtype)
        with T.If(at.tokens <= FEW_TOKENS):
            with T.Then():
                _few_up(shape, at)
                _rotate(shape, at)
                _few_down(shape, at)
            with T.Else():
                _route(shape, at)
                _many_up(shape, at)
                _rotate(shape, at)
                _many_down(shape, at)
                _combine(shape, at)
    return k.finish()


def _known(expert: Any, experts: int) -> Any:
    return tirx.all(expert >= 0, expert < experts)


def _expert_of(at: _Buffers, pair: Any, top_k: int) -> Any:
    return bind(tirx.Cast("int64", load(at.ids, [divide(pair, top_k), modulo(pair, top_k)])))


def _few_up(shape: ExpertsShape, at: _Buffers) -> None:
    names = [name for name in ("gate", "up") if name in at.words]
    tiles = at.stacks["up"][0].row_tiles
    with groups(tiles, at.pairs) as (tile, pair, thread):
        expert = _expert_of(at, pair, shape.top_k)
        sums = Product(thread, len(names), 1)
        with when(_known(expert, shape.experts)):
            rows = Rows(at.x, lambda _: divide(pair, shape.top_k))
            sums.add(tile, [at.choice(name, expert) for name in names], rows)

        def write(row: Any, _token: Any, totals: list[Any]) -> None:
            with when(_known(expert, shape.experts)):
                store(at.inner, [pair, row], _activated(shape, at, names, expert, row, totals))

        sums.finish(tile, shape.intermediate, write)


def _activated(
    shape: ExpertsShape, at: _Buffers, names: Sequence[str], expert: Any, row: Any, totals: list[Any]
) -> Any:
    values = [at.biased(name, expert, row, total) for name, total in zip(names, totals, strict=True)]
    return activation_expr(shape.activation, values[0] if len(values) > 1 else None, values[-1])


def _rotate(shape: ExpertsShape, at: _Buffers) -> None:
    """Multiply blocks of the hidden tensor by a Hadamard matrix, a thread each."""
    if not shape.rotated:
        return
    with each(at.pairs * shape.rotated) as number:
        pair, first = bind(divide(number, shape.rotated)), bind(modulo(number, shape.rotated) * BLOCK)
        values = [bind(load(at.inner, [pair, first + column])) for column in range(BLOCK)]
        width = 1
        while width < BLOCK:
            for column in range(BLOCK):
                if not column & width:
                    left, right = values[column], values[column + width]
                    values[column], values[column + width] = bind(left + right), bind(left - right)
            width *= 2
        for column, value in enumerate(values):
            store(at.inner, [pair, first + column], value * T.float32(BLOCK**-0.5))


def _few_down(shape: ExpertsShape, at: _Buffers) -> None:
    tiles = at.stacks["down"][0].row_tiles
    with groups(tiles, at.tokens) as (tile, token, thread):
        sums = Product(thread, 1, 1)
        with loop(0, shape.top_k) as slot:
            expert = bind(tirx.Cast("int64", load(at.ids, [token, slot])))
            with when(_known(expert, shape.experts)):
                share = bind(load(at.weights, [token, slot]))
                _add_down(sums, tile, at, expert, bind(token * shape.top_k + slot), share)

        def write(row: Any, _token: Any, totals: list[Any]) -> None:
            value = _register(totals[0])
            if "down_bias" in at.biases:
                with loop(0, shape.top_k) as slot:
                    expert = bind(tirx.Cast("int64", load(at.ids, [token, slot])))
                    with when(_known(expert, shape.experts)):
                        bias = load(at.biases["down_bias"], [expert, row])
                        store(value, [0], load(value, [0]) + load(at.weights, [token, slot]) * bias)
            store(at.y, [token, row], load(value, [0]))

        sums.finish(tile, shape.hidden, write)


def _add_down(sums: Product, tile: Any, at: _Buffers, expert: Any, pair: Any, share: Any) -> None:
    sums.add(tile, [at.choice("down", expert)], Rows(at.inner, lambda _: pair), share)


def _register(value: Any) -> Any:
    """A register that starts with `value`."""
    register = T.alloc_buffer((1,), "float32", scope="local")
    store(register, [0], value)
    return register


def _route(shape: ExpertsShape, at: _Buffers) -> None:
    """Fill `routing` in one work-group: the pairs by expert, in order, then the tiles."""
    tiles = shape.tiles(at.pairs)
    with groups(1) as (_, _, thread):
        counts = shared(shape.experts, "int32")
        with strided(thread, shape.experts) as expert:
            store(counts, [expert], T.int32(0))
            with loop(0, at.pairs) as pair, when(_expert_of(at, pair, shape.top_k) == expert):
                store(counts, [expert], load(counts, [expert]) + 1)
        barrier()
        with when(thread == 0):
            _cut(shape, at, tiles, counts)
        barrier()
        with strided(thread, shape.experts) as expert:
            place = T.alloc_buffer((1,), "int32", scope="local")
            store(place, [0], load(counts, [expert]))
            with loop(0, at.pairs) as pair, when(_expert_of(at, pair, shape.top_k) == expert):
                store(at.routing, [load(place, [0])], tirx.Cast("int32", pair))
                store(place, [0], load(place, [0]) + 1)


def _cut(shape: ExpertsShape, at: _Buffers, tiles: Any, counts: Any) -> None:
    """Write the tiles, and to `counts` where each expert's pairs begin; by one thread."""
    state = T.alloc_buffer(
        (3,), "int32", scope="local"
    )  # first pair, tile, pairs of the expert that are left
    store(state, [0], T.int32(0))
    store(state, [1], T.int32(0))
    with loop(0, shape.experts) as expert:
        store(state, [2], load(counts, [expert]))
        store(counts, [expert], load(state, [0]))
        # Bound: generated code evaluates a loop's extent in every turn.
        cuts = bind(divide(tirx.Cast("int64", load(state, [2])) + (TOKENS - 1), TOKENS))
        with loop(0, cuts):
            size = bind(tirx.min(load(state, [2]), T.int32(TOKENS)))
            values = (tirx.Cast("int32", expert), load(state, [0]), size)
            for number, value in enumerate(values):
                entry = tirx.Cast("int64", load(state, [1])) * _TILE + number
                store(at.routing, [at.pairs + entry], value)
            store(state, [0], load(state, [0]) + size)
            store(state, [1], load(state, [1]) + 1)
            store(state, [2], load(state, [2]) - size)
    used = bind(tirx.Cast("int64", load(state, [1])))
    with loop(0, tiles - used) as spare:
        store(at.routing, [at.pairs + (used + spare) * _TILE], T.int32(-1))


@dataclass(frozen=True)
class _Tile:
    """A tile of the routing tensor, of `count` pairs (0: none)."""

    expert: Any
    first: Any
    count: Any

    @classmethod
    def read(cls, at: _Buffers, number: Any) -> _Tile:
        entry = [load(at.routing, [at.pairs + number * _TILE + part]) for part in range(_TILE)]
        expert, first, count = (bind(tirx.Cast("int64", value)) for value in entry)
        return cls(expert, first, count)

    def pair(self, at: _Buffers, number: Any) -> Any:
        """Its pair `number`, the last one for numbers behind it."""
        place = self.first + clamped(int64(number), self.count)
        return bind(tirx.Cast("int64", load(at.routing, [place])))


def _many_up(shape: ExpertsShape, at: _Buffers) -> None:
    names = [name for name in ("gate", "up") if name in at.words]
    row_tiles = at.stacks["up"][0].row_tiles
    with groups(row_tiles, shape.tiles(at.pairs)) as (row_tile, number, thread):
        tile = _Tile.read(at, number)
        sums = Product(thread, len(names), TOKENS)
        with when(tile.expert >= 0):
            choices = [at.choice(name, tile.expert) for name in names]
            rows = Rows(at.x, lambda token: divide(tile.pair(at, token), shape.top_k))
            sums.add(row_tile, choices, rows)

        def write(row: Any, token: Any, totals: list[Any]) -> None:
            with when(tirx.all(tile.expert >= 0, token < tile.count)):
                value = _activated(shape, at, names, tile.expert, row, totals)
                store(at.inner, [tile.pair(at, token), row], value)

        sums.finish(row_tile, shape.intermediate, write)


def _many_down(shape: ExpertsShape, at: _Buffers) -> None:
    row_tiles = at.stacks["down"][0].row_tiles
    with groups(row_tiles, shape.tiles(at.pairs)) as (row_tile, number, thread):
        tile = _Tile.read(at, number)
        sums = Product(thread, 1, TOKENS)
        with when(tile.expert >= 0):
            rows = Rows(at.inner, lambda token: tile.pair(at, token))
            sums.add(row_tile, [at.choice("down", tile.expert)], rows)

        def write(row: Any, token: Any, totals: list[Any]) -> None:
            with when(tirx.all(tile.expert >= 0, token < tile.count)):
                value = at.biased("down", tile.expert, row, totals[0])
                store(at.partial, [tile.pair(at, token), row], value)

        sums.finish(row_tile, shape.hidden, write)


def _combine(shape: ExpertsShape, at: _Buffers) -> None:
    """Add up what a token's experts gave, in the order of its ids."""
    with each(at.tokens * shape.hidden) as number:
        token, row = bind(divide(number, shape.hidden)), bind(modulo(number, shape.hidden))
        total = _register(T.float32(0))
        with loop(0, shape.top_k) as slot:
            expert = bind(tirx.Cast("int64", load(at.ids, [token, slot])))
            with when(_known(expert, shape.experts)):
                part = load(at.partial, [token * shape.top_k + slot, row])
                store(total, [0], load(total, [0]) + load(at.weights, [token, slot]) * part)
        store(at.y, [token, row], load(total, [0]))
