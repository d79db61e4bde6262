"""Attention over a key-value cache, for decoding and prefill alike.

A work-group takes one query of one head through the keys in blocks of `THREADS`, with the online softmax: a
thread scores a key of the block, and owns columns of the values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.activations import tanh
from moqc.schedules.cpu.emit import bind, ceildiv, int64, kernel, load, loop, store, symbol, unravel, when
from moqc.schedules.portable.emit import (
    THREADS,
    barrier,
    divide,
    each,
    groups,
    local,
    modulo,
    shared,
    strided,
)

_MASKED = -1e30


@dataclass(frozen=True)
class AttentionShape:
    """What is fixed about one attention; `window`, `chunk` and `softcap` of 0 mean none."""

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    scale: float
    slots: int
    context: int
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: bool = False


class _Buffers:
    def __init__(self, k: Any, shape: AttentionShape, dtype: str) -> None:
        self.batch, self.tokens = symbol("batch"), symbol("tokens")
        rows, heads = [self.batch, shape.key_heads, self.tokens], shape.heads
        self.q = k.parameter("q", [self.batch, heads, self.tokens, shape.key_width], "float32")
        self.k = k.parameter("k", [*rows, shape.key_width], "float32")
        self.v = k.parameter("v", [*rows, shape.value_width], "float32")
        self.positions = k.parameter("positions", [self.batch, self.tokens], dtype)
        cache = [shape.slots, shape.key_heads, shape.context]
        self.keys = k.parameter("k_cache", [*cache, shape.key_width], "float32")
        self.values = k.parameter("v_cache", [*cache, shape.value_width], "float32")
        self.sinks = k.parameter("sinks", [heads], "float32") if shape.sinks else None
        self.out = k.parameter("out", [self.batch, self.tokens, heads, shape.value_width], "float32")


def attention_function(shape: AttentionShape, dtype: str) -> tirx.PrimFunc:
    """Build the kernels of ``R.moqc.cached_attention``.

    Parameters, float32 but positions (`dtype` ``[B, S]``): q ``[B, H, S, D]``, k ``[B, Hk, S, D]``, v ``[B,
    Hk, S, Dv]``, positions, k_cache ``[Bc, Hk, C, D]`` and v_cache ``[Bc, Hk, C, Dv]`` (written in place),
    sinks ``[H]`` if any, out ``[B, S, H, Dv]``. A token's slot is its position; tokens of position < 0 or >=
    C are not cached, and the output of those below 0 is 0.
    """
    with kernel("attention", heads=shape.heads) as k:
        at = _Buffers(k, shape, dtype)
        _write_cache(shape, at)
        with groups(at.tokens, at.batch * shape.heads) as (token, number, thread):
            row, head = bind(divide(number, shape.heads)), bind(modulo(number, shape.heads))
            _attend(shape, at, token, head, row, thread)
    return k.finish()


def _write_cache(shape: AttentionShape, at: _Buffers) -> None:
    """Copy this call's keys and values to their slots."""
    for source, cache, width in ((at.k, at.keys, shape.key_width), (at.v, at.values, shape.value_width)):
        extents = [at.batch, shape.key_heads, at.tokens, width]
        with each(at.batch * at.tokens * (shape.key_heads * width)) as number:
            row, head, token, column = (bind(index) for index in unravel(number, extents))
            slot = bind(tirx.Cast("int64", load(at.positions, [row, token])))
            with when(tirx.all(slot >= 0, slot < shape.context)):
                store(cache, [row, head, slot, column], load(source, [row, head, token, column]))


def _attend(shape: AttentionShape, at: _Buffers, token: Any, head: Any, row: Any, thread: Any) -> None:
    query, weights = shared(shape.key_width), shared(THREADS)
    columns = ceildiv(shape.value_width, THREADS)
    sums, top, total = local(columns), local(1), local(1)
    for number in range(columns):
        store(sums, [number], T.float32(0))
    store(top, [0], T.float32(_MASKED))
    store(total, [0], T.float32(0))
    with strided(thread, shape.key_width) as column:
        store(query, [column], load(at.q, [row, head, token, column]) * T.float32(shape.scale))
    position = bind(tirx.Cast("int64", load(at.positions, [row, token])))
    end = bind(tirx.min(position + 1, int64(shape.context)))
    begin = int64(0)
    if shape.window:
        begin = tirx.max(position - (shape.window - 1), begin)
    if shape.chunk:
        begin = tirx.max(divide(tirx.max(position, int64(0)), shape.chunk) * shape.chunk, begin)
    begin = bind(begin)
    key_head = bind(divide(head, shape.heads // shape.key_heads))
    barrier()
    blocks = bind(divide(tirx.max(end - begin, int64(0)) + (THREADS - 1), THREADS))
    with loop(0, blocks) as block:
        first = bind(begin + block * THREADS)
        count = bind(tirx.min(end - first, int64(THREADS)))
        score = _score(shape, at, query, [row, key_head, bind(first + thread)], thread < count)
        store(weights, [thread], score)
        barrier()
        _accumulate(shape, at, [row, key_head, first], count, thread, weights, sums, top, total)
        barrier()
    _finish(shape, at, [row, token, head], thread, sums, top, total)


def _score(shape: AttentionShape, at: _Buffers, query: Any, place: list[Any], valid: Any) -> Any:
    """The query's product with one key, or the value of masked ones."""
    score = local(1)
    store(score, [0], T.float32(_MASKED))
    with when(valid):
        store(score, [0], T.float32(0))
        with loop(0, shape.key_width) as column:
            term = load(query, [column]) * load(at.keys, [*place, column])
            store(score, [0], load(score, [0]) + term)
        if shape.softcap:
            capped = tanh(load(score, [0]) * T.float32(1 / shape.softcap)) * T.float32(shape.softcap)
            store(score, [0], capped)
    return load(score, [0])


def _accumulate(
    shape: AttentionShape,
    at: _Buffers,
    place: list[Any],
    count: Any,
    thread: Any,
    weights: Any,
    sums: Any,
    top: Any,
    total: Any,
) -> None:
    """Add a block's values; every thread follows the largest score and the sum of weights by itself."""
    best, (row, head, first) = local(1), place
    store(best, [0], load(top, [0]))
    with loop(0, count) as key:
        store(best, [0], tirx.max(load(best, [0]), load(weights, [key])))
    shrink = bind(tirx.exp(load(top, [0]) - load(best, [0])))
    store(top, [0], load(best, [0]))
    store(total, [0], load(total, [0]) * shrink)
    for number in range(shape.value_width // THREADS + bool(shape.value_width % THREADS)):
        store(sums, [number], load(sums, [number]) * shrink)
    with loop(0, count) as key:
        weight = bind(tirx.exp(load(weights, [key]) - load(top, [0])))
        store(total, [0], load(total, [0]) + weight)
        for number, column in _columns(shape, thread):
            value = load(at.values, [row, head, first + key, column])
            store(sums, [number], load(sums, [number]) + weight * value)


def _columns(shape: AttentionShape, thread: Any) -> list[tuple[int, Any]]:
    """The columns of the values that a thread owns; where it has one less, the last one again."""
    numbers = range(ceildiv(shape.value_width, THREADS))
    return [(number, tirx.min(thread + number * THREADS, int64(shape.value_width - 1))) for number in numbers]


def _finish(
    shape: AttentionShape, at: _Buffers, place: list[Any], thread: Any, sums: Any, top: Any, total: Any
) -> None:
    """Divide by the sum of weights, sinks included, and write the result."""
    row, token, head = place
    divisor, factor = load(total, [0]), T.float32(1)
    if at.sinks is not None:
        sink = bind(load(at.sinks, [head]))
        best = bind(tirx.max(load(top, [0]), sink))
        factor = bind(tirx.exp(load(top, [0]) - best))
        divisor = load(total, [0]) * factor + tirx.exp(sink - best)
    # No key at all: the output is 0, not 0 / 0.
    factor = bind(factor / T.if_then_else(divisor > T.float32(0), divisor, T.float32(1)))
    for number, column in _columns(shape, thread):
        with when(thread + number * THREADS < shape.value_width):
            store(at.out, [row, token, head, column], load(sums, [number]) * factor)
