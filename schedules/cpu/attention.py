"""Attention on CPUs: one kernel for decoding and prefill, with and without a KV cache.

Rows are the (query token, query head) pairs that share a key head; a task takes `ROWS` of them through the
keys in blocks of `KEYS` slots with the online softmax. Scores of `lanes` keys are dot products along the head
dimension, folded into one vector; values are accumulated in registers, four rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from moqc.schedules.activations import exp, tanh
from moqc.schedules.cpu.vector import (
    PARALLEL_WORK,
    common_lanes,
    each_vector,
    fold_rows,
    int64,
    load,
    local,
    opaque,
    parallel_if,
    reduce_lanes,
    splat,
    store,
    zeros,
)

ROWS = 16
KEYS = 64
_REGISTER_ROWS = 4
_REGISTER_VECTORS = 4
_MASKED = -1e30


@dataclass(frozen=True)
class AttentionShape:
    """What is fixed about one attention operator; batch, tokens and slots may be symbolic.

    `scale` multiplies the scores; `window` and `softcap` of 0 mean none; `lanes` is the vector width.
    """

    heads: int
    key_heads: int
    key_width: int
    value_width: int
    scale: float
    window: int
    softcap: float
    causal: bool
    sinks: bool
    lanes: int

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads


class _Buffers:
    """The kernel's arguments and, inside a task, its scratch."""

    def __init__(self, shape: AttentionShape, batch: Any, tokens: Any, cache: tuple[Any, Any] | None) -> None:
        def tensor(name: str, *extents: Any, dtype: str = "float32") -> Any:
            return T.arg(name, T.buffer([int64(e) if isinstance(e, int) else e for e in extents], dtype))

        key_heads, key_width, value_width = shape.key_heads, shape.key_width, shape.value_width
        self.shape, self.batch, self.tokens = shape, batch, tokens
        self.q = tensor("q", batch, shape.heads, tokens, key_width)
        self.k = tensor("k", batch, key_heads, tokens, key_width)
        self.v = tensor("v", batch, key_heads, tokens, value_width)
        self.positions = tensor("positions", batch, tokens, dtype="int64")
        self.keys, self.values, self.cached = self.k, self.v, cache is not None
        if cache is not None:
            self.keys = tensor("k_cache", cache[0], key_heads, cache[1], key_width)
            self.values = tensor("v_cache", cache[0], key_heads, cache[1], value_width)
        self.sinks = tensor("sinks", shape.heads) if shape.sinks else None
        self.out = tensor("out", batch, tokens, shape.heads, value_width)
        self.lanes = common_lanes(shape.lanes, key_width)
        self.value_lanes = common_lanes(shape.lanes, value_width)

    def allocate(self) -> None:
        """Scratch of one task."""
        self.scaled = local((ROWS, self.shape.key_width))
        self.sums = local((ROWS, self.shape.value_width))
        self.scores = local((ROWS, KEYS))
        self.top = local((ROWS,))
        self.total = local((ROWS, self.lanes))
        self.place = local((ROWS,), "int32")
        self.bounds = local((2,), "int32")
        self.tile = local((self.lanes, self.lanes))
        self.best = local((self.lanes,))
        self.registers = local((_REGISTER_ROWS, _REGISTER_VECTORS * self.value_lanes))


def attention_kernel(
    shape: AttentionShape, batch: Any, tokens: Any, cache: tuple[Any, Any] | None
) -> tirx.PrimFunc:
    """The kernel of R.moqc.attention (`cache` None) or R.moqc.cached_attention (cache = its batch and slots).

    Arguments, all float32 but positions: q [B,H,S,D], k [B,Hk,S,D], v [B,Hk,S,Dv], positions int64 [B,S],
    k_cache [Bc,Hk,C,D] and v_cache [Bc,Hk,C,Dv] (written in place), sinks [H] if any, out [B,S,H,Dv]. `batch`
    and `tokens` are ints or int64 variables. Tokens of position < 0 are not cached and their output is 0; a
    cached token's slot is its position, which must be below C.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("cached_attention" if cache is not None else "attention")
        T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True, "op_pattern": 8})
        T.func_attr({"moqc.kernel": {"kind": "attention", "cached": int(cache is not None)}})
        buffers = _Buffers(shape, batch, tokens, cache)
        with opaque("attention"):
            work = local((1,), "int64")
            T.buffer_store(work, int64(0), [int64(0)])
            if buffers.cached:
                _write_cache(buffers, work)
            else:
                T.buffer_store(work, buffers.batch * tokens * tokens, [int64(0)])
            blocks = tirx.ceildiv(tokens * shape.group, int64(ROWS))
            macs = work[int64(0)] * (shape.heads * (shape.key_width + shape.value_width))

            def task(index: tirx.Expr) -> None:
                with opaque("task"):
                    buffers.allocate()
                    outer = T.bind(index // blocks)
                    _task(buffers, outer // shape.key_heads, outer % shape.key_heads, index % blocks)

            parallel_if(macs > PARALLEL_WORK, batch * shape.key_heads * blocks, task)
    return builder.get()


def _write_cache(buffers: _Buffers, work: Any) -> None:
    """Copy this call's keys and values to their slots, and count the (query, key) pairs into `work`."""
    shape = buffers.shape
    with T.grid(buffers.batch, buffers.tokens) as (b, s):
        position = T.bind(buffers.positions[b, s])
        with T.If(position >= 0), T.Then():
            span = position + 1 if shape.window == 0 else tirx.min(position + 1, int64(shape.window))
            T.buffer_store(work, work[int64(0)] + span, [int64(0)])
            with T.serial(int64(0), int64(shape.key_heads)) as head:
                for source, target, width, lanes in (
                    (buffers.k, buffers.keys, shape.key_width, buffers.lanes),
                    (buffers.v, buffers.values, shape.value_width, buffers.value_lanes),
                ):
                    with each_vector(width, lanes) as d:
                        value = load(source, b, head, s, d, lanes=lanes)
                        store(target, value, b, head, position, d, lanes=lanes)


def _task(buffers: _Buffers, b: Any, head: Any, block: Any) -> None:
    """Attention of rows block*ROWS.. of one batch entry and key head."""
    shape = buffers.shape
    b, head, first = T.bind(b), T.bind(head), T.bind(block * ROWS)
    count = T.bind(tirx.min(int64(ROWS), buffers.tokens * shape.group - first))
    _start_rows(buffers, b, head, first, count)
    low, high = T.bind(buffers.bounds[int64(0)]), T.bind(buffers.bounds[int64(1)])
    # A negative extent runs zero times.
    with T.serial(int64(0), int64((high - low + (KEYS - 1)) // KEYS)) as step:
        start = T.bind(int64(low) + step * KEYS)
        keys = T.bind(tirx.min(int64(KEYS), int64(high) - start))
        with T.serial(int64(0), count) as row:
            _score_row(buffers, (b, head), row, start, keys, int64(high))
            _renormalize(buffers, row, keys)
        full = T.bind(count // _REGISTER_ROWS)
        with T.serial(int64(0), full) as quad:
            _accumulate(buffers, (b, head), quad * _REGISTER_ROWS, _REGISTER_ROWS, start, keys)
        with T.serial(full * _REGISTER_ROWS, count) as row:
            _accumulate(buffers, (b, head), row, 1, start, keys)
    with T.serial(int64(0), count) as row:
        _finish_row(buffers, b, head, first, row)


def _start_rows(buffers: _Buffers, b: Any, head: Any, first: Any, count: Any) -> None:
    """Load the queries, times the scale; reset the accumulators; find the range of slots the rows attend."""
    shape, lanes = buffers.shape, buffers.lanes
    low, high = (0, tirx.Cast("int32", buffers.tokens)) if not buffers.cached else (2**31 - 1, 0)
    T.buffer_store(buffers.bounds, low, [int64(0)])
    T.buffer_store(buffers.bounds, high, [int64(1)])
    with T.serial(int64(0), count) as row:
        token, query = (
            T.bind((first + row) // shape.group),
            T.bind(head * shape.group + (first + row) % shape.group),
        )
        position = T.bind(tirx.Cast("int32", buffers.positions[b, token]))
        T.buffer_store(buffers.place, position, [row])
        with each_vector(shape.key_width, lanes) as d:
            store(
                buffers.scaled,
                load(buffers.q, b, query, token, d, lanes=lanes) * shape.scale,
                row,
                d,
                lanes=lanes,
            )
        with each_vector(shape.value_width, buffers.value_lanes) as d:
            store(buffers.sums, zeros(buffers.value_lanes), row, d, lanes=buffers.value_lanes)
        store(buffers.total, zeros(lanes), row, int64(0), lanes=lanes)
        if buffers.sinks is None:
            T.buffer_store(buffers.top, tirx.const(_MASKED, "float32"), [row])
        else:
            T.buffer_store(buffers.top, buffers.sinks[query], [row])
            T.buffer_store(buffers.total, tirx.const(1.0, "float32"), [row, int64(0)])
        if buffers.cached:
            reach = 0 if shape.window == 0 else tirx.max(position - (shape.window - 1), 0)
            with T.If(position >= 0), T.Then():
                T.buffer_store(buffers.bounds, tirx.min(buffers.bounds[int64(0)], reach), [int64(0)])
                T.buffer_store(buffers.bounds, tirx.max(buffers.bounds[int64(1)], position + 1), [int64(1)])


def _score_row(buffers: _Buffers, where: tuple[Any, Any], row: Any, start: Any, keys: Any, end: Any) -> None:
    """Masked scores of one row against `keys` slots from `start` on, and their maximum per lane in `best`."""
    shape, lanes = buffers.shape, buffers.lanes
    store(buffers.best, splat(tirx.const(_MASKED, "float32"), lanes), int64(0), lanes=lanes)
    with T.serial(int64(0), tirx.ceildiv(keys, int64(lanes))) as tile:
        base = T.bind(start + tile * lanes)
        with T.unroll(int64(0), int64(lanes)) as i:
            # A slot past the end reads the last one; the mask discards it.
            slot = tirx.min(base + i, end - 1)
            store(buffers.tile, zeros(lanes), i, int64(0), lanes=lanes)
            with each_vector(shape.key_width, lanes) as d:
                key = load(buffers.keys, *where, slot, d, lanes=lanes)
                value = key * load(buffers.scaled, row, d, lanes=lanes)
                store(
                    buffers.tile,
                    load(buffers.tile, i, int64(0), lanes=lanes) + value,
                    i,
                    int64(0),
                    lanes=lanes,
                )
        score = T.bind(fold_rows(buffers.tile, lanes))
        if shape.softcap:
            score = tanh(score * (1.0 / shape.softcap)) * shape.softcap
        masked = tirx.Select(
            _visible(buffers, where[0], row, base, end), score, splat(tirx.const(_MASKED, "float32"), lanes)
        )
        store(buffers.scores, masked, row, tile * lanes, lanes=lanes)
        best = tirx.max(
            load(buffers.best, int64(0), lanes=lanes), load(buffers.scores, row, tile * lanes, lanes=lanes)
        )
        store(buffers.best, best, int64(0), lanes=lanes)


def _visible(buffers: _Buffers, b: Any, row: Any, base: Any, end: Any) -> tirx.Expr:
    """Which of the `lanes` slots from `base` on the row attends."""
    shape, lanes = buffers.shape, buffers.lanes
    query = splat(buffers.place[row], lanes)
    first = tirx.Cast("int32", base)
    slots = first if lanes == 1 else tirx.Ramp(first, tirx.const(1, "int32"), lanes)
    if buffers.cached:
        position, seen = slots, slots >= splat(tirx.const(0, "int32"), lanes)
    else:
        # The slots of this call's own keys hold any positions, also -1; the vector is gathered by hand.
        gathered = local((lanes,), "int32")
        with T.unroll(int64(0), int64(lanes)) as i:
            place = buffers.positions[b, tirx.min(base + i, end - 1)]
            T.buffer_store(gathered, tirx.Cast("int32", place), [i])
        position = load(gathered, int64(0), lanes=lanes)
        seen = (slots < splat(tirx.Cast("int32", end), lanes)) & (
            position >= splat(tirx.const(0, "int32"), lanes)
        )
    if shape.causal:
        seen = seen & (position <= query)
    if shape.window:
        seen = seen & (position > query - shape.window)
    return seen


def _renormalize(buffers: _Buffers, row: Any, keys: Any) -> None:
    """Turn the row's scores into weights relative to the new maximum, and rescale what was summed so far."""
    lanes, wide = buffers.lanes, buffers.value_lanes
    peak = T.bind(tirx.max(buffers.top[row], reduce_lanes(buffers.best, lanes, tirx.max)))
    factor = T.bind(exp(buffers.top[row] - peak))
    T.buffer_store(buffers.top, peak, [row])
    total = load(buffers.total, row, int64(0), lanes=lanes) * splat(factor, lanes)
    store(buffers.total, total, row, int64(0), lanes=lanes)
    with T.serial(int64(0), tirx.ceildiv(keys, int64(lanes))) as tile:
        score = T.bind(load(buffers.scores, row, tile * lanes, lanes=lanes))
        seen = score > splat(tirx.const(_MASKED / 10, "float32"), lanes)
        weight = T.bind(tirx.Select(seen, exp(score - splat(peak, lanes)), zeros(lanes)))
        store(buffers.scores, weight, row, tile * lanes, lanes=lanes)
        store(
            buffers.total,
            load(buffers.total, row, int64(0), lanes=lanes) + weight,
            row,
            int64(0),
            lanes=lanes,
        )
    with each_vector(buffers.shape.value_width, wide) as d:
        value = load(buffers.sums, row, d, lanes=wide) * splat(factor, wide)
        store(buffers.sums, value, row, d, lanes=wide)


def _accumulate(
    buffers: _Buffers, where: tuple[Any, Any], row: Any, rows: int, start: Any, keys: Any
) -> None:
    """Add weight x value of `keys` slots to the sums of `rows` rows, held in registers meanwhile."""
    lanes, width = buffers.value_lanes, buffers.shape.value_width
    for first in range(0, width, _REGISTER_VECTORS * lanes):
        vectors = min(_REGISTER_VECTORS, (width - first) // lanes)

        def copy(source: Any, target: Any, at_source: Any, at_target: Any, *, vectors: int = vectors) -> None:
            with T.unroll(int64(0), int64(rows)) as r, T.unroll(int64(0), int64(vectors)) as d:
                value = load(source, r + at_source[0], d * lanes + at_source[1], lanes=lanes)
                store(target, value, r + at_target[0], d * lanes + at_target[1], lanes=lanes)

        copy(buffers.sums, buffers.registers, (row, first), (0, 0))
        with T.serial(int64(0), keys) as key:
            with T.unroll(int64(0), int64(rows)) as r, T.unroll(int64(0), int64(vectors)) as d:
                weight = splat(buffers.scores[row + r, key], lanes)
                value = weight * load(buffers.values, *where, start + key, d * lanes + first, lanes=lanes)
                total = load(buffers.registers, r, d * lanes, lanes=lanes) + value
                store(buffers.registers, total, r, d * lanes, lanes=lanes)
        copy(buffers.registers, buffers.sums, (0, 0), (row, first))


def _finish_row(buffers: _Buffers, b: Any, head: Any, first: Any, row: Any) -> None:
    """Divide by the softmax's denominator; a row that attended nothing is 0."""
    shape, lanes, wide = buffers.shape, buffers.lanes, buffers.value_lanes
    store(buffers.best, load(buffers.total, row, int64(0), lanes=lanes), int64(0), lanes=lanes)
    total = T.bind(reduce_lanes(buffers.best, lanes, lambda a, c: a + c))
    scale = T.bind(tirx.Select(total > 0.0, 1.0 / total, tirx.const(0.0, "float32")))
    token, query = (
        T.bind((first + row) // shape.group),
        T.bind(head * shape.group + (first + row) % shape.group),
    )
    with each_vector(shape.value_width, wide) as d:
        value = load(buffers.sums, row, d, lanes=wide) * splat(scale, wide)
        store(buffers.out, value, b, token, query, d, lanes=wide)
