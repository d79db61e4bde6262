"""Linear recurrences on CPUs: one kernel for decoding and prefill, with and without a state.

The columns of a head's state [K, V] do not see each other, so a task takes one sequence, one head and a block
of columns through all tokens, with its part of the state in scratch. Vectors run along the columns; where a
head has a single one (Mamba's channels), along the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.activations import exp
from moqc.schedules.cpu.emit import Kernel, bind, int64, kernel, load, loop, store, when
from moqc.schedules.cpu.vector import (
    PARALLEL_WORK,
    common_lanes,
    each_vector,
    parallel_if,
    reduce_lanes,
    spread,
    vector_type,
)

_COLUMNS = 64
"""Columns a task has at most: with 128 keys their state is half an L1 cache."""


@dataclass(frozen=True)
class RecurrentShape:
    """What is fixed about one recurrence; batch and tokens may be symbolic.

    `wide_decay`: the decay has one factor a key. `beta` and `rate`: there are such operands. `lanes` is the
    vector width.
    """

    heads: int
    key_heads: int
    keys: int
    columns: int
    wide_decay: bool
    beta: bool
    rate: bool
    lanes: int

    @property
    def block(self) -> int:
        """Columns of a task."""
        return next(size for size in range(min(_COLUMNS, self.columns), 0, -1) if self.columns % size == 0)


class _Buffers:
    """The kernel's arguments and, inside a task, its scratch."""

    def __init__(self, k: Kernel, shape: RecurrentShape, batch: Any, tokens: Any, rows: Any | None) -> None:
        self.shape, self.batch, self.tokens = shape, int64(batch), int64(tokens)
        narrow, wide = [batch, tokens, shape.heads], [batch, tokens, shape.key_heads, shape.keys]
        self.q = k.parameter("q", wide, "float32")
        self.k = k.parameter("k", wide, "float32")
        self.v = k.parameter("v", [*narrow, shape.columns], "float32")
        self.decay = k.parameter("decay", [*narrow, shape.keys] if shape.wide_decay else narrow, "float32")
        self.positions = k.parameter("positions", [batch, tokens], "int64")
        whole = [rows, shape.heads, shape.keys, shape.columns]
        self.state = None if rows is None else k.parameter("state", whole, "float32")
        self.beta = k.parameter("beta", narrow, "float32") if shape.beta else None
        self.rate = k.parameter("rate", [shape.heads, shape.keys], "float32") if shape.rate else None
        self.out = k.parameter("out", [*narrow, shape.columns], "float32")
        # Vectors along the keys where there is one column, along the columns elsewhere.
        self.along_keys = shape.columns == 1
        self.lanes = common_lanes(shape.lanes, shape.keys if self.along_keys else shape.block)
        self.key_lanes = common_lanes(shape.lanes, shape.keys)
        self.kind, self.key_kind = vector_type(self.lanes), vector_type(self.key_lanes)

    def allocate(self) -> None:
        """Scratch of one task."""
        size, block = self.shape.keys, self.shape.block
        self.part = T.alloc_buffer((size * block,), "float32")
        self.factors = T.alloc_buffer((size,), "float32")
        self.known = T.alloc_buffer((self.lanes if self.along_keys else block,), "float32")
        self.read = T.alloc_buffer((self.lanes if self.along_keys else block,), "float32")

    @property
    def factor_each(self) -> bool:
        """Whether every key has a factor of its own."""
        return self.shape.wide_decay or self.shape.rate


def recurrent_kernel(shape: RecurrentShape, batch: Any, tokens: Any, rows: Any | None) -> tirx.PrimFunc:
    """The kernel of R.moqc.recurrent (`rows` None) or R.moqc.cached_recurrent (`rows` of its state).

    Arguments in the operator's order, then out [B,S,H,V]; the state [rows,H,K,V] is written in place. `batch`
    and `tokens` are ints or int64 variables. The output of a token of position below 0 is 0.
    """
    with kernel("recurrent", cached=int(rows is not None)) as k:
        buffers = _Buffers(k, shape, batch, tokens, rows)
        blocks = shape.columns // shape.block
        work = buffers.batch * buffers.tokens * (shape.heads * shape.keys * shape.columns)

        def task(index: Any) -> None:
            buffers.allocate()
            outer = bind(index // blocks)
            where = (bind(outer // shape.heads), bind(outer % shape.heads))
            _task(buffers, where, bind(index % blocks * shape.block))

        parallel_if(work > PARALLEL_WORK, buffers.batch * (shape.heads * blocks), task)
    return k.finish()


def _task(buffers: _Buffers, where: tuple[Any, Any], first: Any) -> None:
    """One sequence and head, columns from `first` on."""
    if buffers.state is None:
        _clear(buffers)
    else:
        _copy_state(buffers, where, first, into=True)
    b, head = where
    with loop(0, buffers.tokens) as s:
        position = bind(load(buffers.positions, [b, s]))
        with when(position == 0):
            _clear(buffers)
        with T.If(position >= 0):
            with T.Then():
                _factors(buffers, b, s, head)
                step = _step_along_keys if buffers.along_keys else _step_along_columns
                step(buffers, (b, s, head), first)
            with T.Else(), each_vector(buffers.shape.block, _out_lanes(buffers)) as c:
                store(buffers.out, [b, s, head, first + c], spread(0.0, _out_lanes(buffers)))
    if buffers.state is not None:
        _copy_state(buffers, where, first, into=False)


def _out_lanes(buffers: _Buffers) -> int:
    return 1 if buffers.along_keys else buffers.lanes


def _clear(buffers: _Buffers) -> None:
    size = buffers.shape.keys * buffers.shape.block
    with loop(0, size // buffers.lanes) as i:
        store(buffers.part, [i * buffers.lanes], spread(0.0, buffers.lanes))


def _copy_state(buffers: _Buffers, where: tuple[Any, Any], first: Any, *, into: bool) -> None:
    """The task's part of the state to scratch, or back."""
    shape, lanes, kind = buffers.shape, buffers.lanes, buffers.kind
    if buffers.along_keys:  # the only column: keys are consecutive
        with each_vector(shape.keys, lanes) as key:
            for offset in range(lanes):
                if into:
                    value = load(buffers.state, [*where, key + offset, 0])
                    store(buffers.part, [key + offset], value)
                else:
                    value = load(buffers.part, [key + offset])
                    store(buffers.state, [*where, key + offset, 0], value)
        return
    with loop(0, shape.keys) as key, each_vector(shape.block, lanes) as c:
        place, slot = [*where, key, first + c], [key * shape.block + c]
        if into:
            store(buffers.part, slot, load(buffers.state, place, kind))
        else:
            store(buffers.state, place, load(buffers.part, slot, kind))


def _factors(buffers: _Buffers, b: Any, s: Any, head: Any) -> None:
    """The factor of each key for this token, or one for all in factors[0]."""
    shape, lanes, kind = buffers.shape, buffers.key_lanes, buffers.key_kind
    if not buffers.factor_each:
        store(buffers.factors, [0], exp(load(buffers.decay, [b, s, head])))
        return
    with loop(0, shape.keys // lanes) as i:
        if shape.wide_decay:
            logarithm = load(buffers.decay, [b, s, head, i * lanes], kind)
        else:
            rate = load(buffers.rate, [head, i * lanes], kind)
            logarithm = rate * spread(load(buffers.decay, [b, s, head]), lanes)
        store(buffers.factors, [i * lanes], exp(logarithm))


def _step_along_columns(buffers: _Buffers, at: tuple[Any, Any, Any], first: Any) -> None:
    """One token: decay, uptake and read-out, a vector of columns at a time."""
    shape, lanes, kind = buffers.shape, buffers.lanes, buffers.kind
    group = shape.heads // shape.key_heads
    b, s, head = at
    key_at = [b, s, bind(head // group)]
    with each_vector(shape.block, lanes) as c:
        store(buffers.known, [c], spread(0.0, lanes))
        store(buffers.read, [c], spread(0.0, lanes))
    if buffers.beta is not None:
        # What the decayed state has for this key; the state is decayed on the way.
        with loop(0, shape.keys) as key:
            factor = bind(spread(_factor(buffers, key), lanes))
            weight = bind(spread(load(buffers.k, [*key_at, key]), lanes))
            with each_vector(shape.block, lanes) as c:
                slot = [key * shape.block + c]
                decayed = bind(load(buffers.part, slot, kind) * factor)
                store(buffers.part, slot, decayed)
                store(buffers.known, [c], load(buffers.known, [c], kind) + decayed * weight)
    with each_vector(shape.block, lanes) as c:
        value = load(buffers.v, [*at, first + c], kind)
        if buffers.beta is not None:
            beta = spread(load(buffers.beta, [b, s, head]), lanes)
            value = (value - load(buffers.known, [c], kind)) * beta
        store(buffers.known, [c], value)
    with loop(0, shape.keys) as key:
        factor = bind(spread(_factor(buffers, key), lanes))
        weight = bind(spread(load(buffers.k, [*key_at, key]), lanes))
        query = bind(spread(load(buffers.q, [*key_at, key]), lanes))
        with each_vector(shape.block, lanes) as c:
            slot = [key * shape.block + c]
            before = load(buffers.part, slot, kind)
            before = before if buffers.beta is not None else before * factor
            after = bind(before + weight * load(buffers.known, [c], kind))
            store(buffers.part, slot, after)
            store(buffers.read, [c], load(buffers.read, [c], kind) + after * query)
    with each_vector(shape.block, lanes) as c:
        store(buffers.out, [*at, first + c], load(buffers.read, [c], kind))


def _factor(buffers: _Buffers, key: Any) -> Any:
    return load(buffers.factors, [key if buffers.factor_each else 0])


def _step_along_keys(buffers: _Buffers, at: tuple[Any, Any, Any], _first: Any) -> None:
    """One token of a head with one column, a vector of keys at a time."""
    shape, lanes, kind = buffers.shape, buffers.lanes, buffers.kind
    group = shape.heads // shape.key_heads
    b, s, head = at
    key_at = [b, s, bind(head // group)]
    value = bind(load(buffers.v, [*at, 0]))
    one = None if buffers.factor_each else bind(spread(load(buffers.factors, [0]), lanes))
    store(buffers.known, [0], spread(0.0, lanes))
    store(buffers.read, [0], spread(0.0, lanes))
    with loop(0, shape.keys // lanes) as i:
        factor = load(buffers.factors, [i * lanes], kind) if one is None else one
        decayed = bind(load(buffers.part, [i * lanes], kind) * factor)
        store(buffers.part, [i * lanes], decayed)
        product = decayed * load(buffers.k, [*key_at, i * lanes], kind)
        store(buffers.known, [0], load(buffers.known, [0], kind) + product)
    if buffers.beta is not None:
        known = reduce_lanes(buffers.known, lanes, lambda one, other: one + other)
        value = bind((value - known) * load(buffers.beta, [b, s, head]))
    with loop(0, shape.keys // lanes) as i:
        uptake = load(buffers.k, [*key_at, i * lanes], kind) * spread(value, lanes)
        after = bind(load(buffers.part, [i * lanes], kind) + uptake)
        store(buffers.part, [i * lanes], after)
        product = after * load(buffers.q, [*key_at, i * lanes], kind)
        store(buffers.read, [0], load(buffers.read, [0], kind) + product)
    store(buffers.out, [*at, 0], reduce_lanes(buffers.read, lanes, lambda one, other: one + other))
