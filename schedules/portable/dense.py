"""What is not quantized: float32 projections, RMS norms, and the router's top-k."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, store, symbol, unravel, when
from moqc.schedules.portable.emit import (
    THREADS,
    barrier,
    divide,
    each,
    groups,
    local,
    product,
    shared,
    strided,
)


def _sum(thread: Any, value: Any, partial: Any) -> Any:
    """The sum of every thread's `value`; `partial` is shared memory for `THREADS` values."""
    store(partial, [thread], value)
    barrier()
    total = local(1)
    store(total, [0], T.float32(0))
    with loop(0, THREADS) as other:
        store(total, [0], load(total, [0]) + load(partial, [other]))
    return bind(load(total, [0]))


def dense_linear_function(rows: int, columns: int) -> tirx.PrimFunc:
    """Build ``x W^T``: x float32 ``[T, K]``, W float32 ``[N, K]``, result ``[T, N]``; a work-group a row."""
    with kernel("dense_linear", rows=rows, columns=columns) as k:
        tokens = symbol("t")
        x = k.parameter("x", [tokens, columns], "float32")
        weight = k.parameter("weight", [rows, columns], "float32")
        y = k.parameter("y", [tokens, rows], "float32")
        with groups(rows, tokens) as (row, token, thread):
            partial, sums = shared(THREADS), local(1)
            store(sums, [0], T.float32(0))
            with strided(thread, columns) as column:
                term = load(x, [token, column]) * load(weight, [row, column])
                store(sums, [0], load(sums, [0]) + term)
            total = _sum(thread, load(sums, [0]), partial)
            with when(thread == 0):
                store(y, [token, row], total)
    return k.finish()


def rms_norm_function(columns: int, epsilon: float, *, weighted: bool, lead: int) -> tirx.PrimFunc:
    """Build ``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis; a work-group a row."""
    with kernel("rms_norm", columns=columns) as k:
        extents = [symbol(f"n{axis}") for axis in range(lead)]
        x = k.parameter("x", [*extents, columns], "float32")
        weight = k.parameter("weight", [columns], "float32") if weighted else None
        y = k.parameter("y", [*extents, columns], "float32")
        with groups(product(extents)) as (number, _, thread):
            at = [bind(index) for index in unravel(number, extents)]
            partial, sums = shared(THREADS), local(1)
            store(sums, [0], T.float32(0))
            with strided(thread, columns) as column:
                value = bind(load(x, [*at, column]))
                store(sums, [0], load(sums, [0]) + value * value)
            total = _sum(thread, load(sums, [0]), partial)
            scale = bind(T.float32(1) / tirx.sqrt(total / T.float32(columns) + T.float32(epsilon)))
            with strided(thread, columns) as column:
                scaled = load(x, [*at, column]) * scale
                store(y, [*at, column], scaled if weight is None else scaled * load(weight, [column]))
    return k.finish()


def _order(value: Any) -> Any:
    """An int32 that orders as the float32 does; NaN are above or below all others."""
    bits = bind(tirx.reinterpret("int32", value))
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def top_k_function(columns: int, count: int, dtype: str, *, lead: int) -> tirx.PrimFunc:
    """Build the `count` largest of the last axis: x float32, values float32 and indices `dtype`.

    A thread a column finds its rank; of equal values the one of lower index is first.
    """
    with kernel("top_k", columns=columns, k=count) as k:
        extents = [symbol(f"n{axis}") for axis in range(lead)]
        x = k.parameter("x", [*extents, columns], "float32")
        values = k.parameter("values", [*extents, count], "float32")
        indices = k.parameter("indices", [*extents, count], dtype)
        with each(product(extents) * columns) as number:
            at = [bind(index) for index in unravel(divide(number, columns), extents)]
            column = bind(tirx.truncmod(number, int64(columns)))
            value = bind(load(x, [*at, column]))
            mine, rank = bind(_order(value)), local(1, "int32")
            store(rank, [0], T.int32(0))
            with loop(0, columns) as other:
                theirs = bind(_order(load(x, [*at, other])))
                ahead = tirx.any(theirs > mine, tirx.all(theirs == mine, other < column))
                store(rank, [0], load(rank, [0]) + tirx.Cast("int32", ahead))
            with when(load(rank, [0]) < count):
                store(values, [*at, load(rank, [0])], value)
                store(indices, [*at, load(rank, [0])], tirx.Cast(dtype, column))
    return k.finish()
