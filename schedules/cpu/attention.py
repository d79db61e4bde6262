"""Attention on CPUs: one kernel for decoding and prefill, with and without a KV cache.

Rows are the (query token, query head) pairs that share a key head; a task takes some of them through the
keys in blocks of `KEYS` slots with the online softmax. Scores of `lanes` keys are dot products along the head
dimension, folded into one vector; values are accumulated in registers, four rows at a time. A block of
a cache that is not float32 is unpacked first, once for all rows of the task.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.activations import exp, tanh
from moqc.schedules.cpu.attention_buffers import KEYS, REGISTER_ROWS, REGISTER_VECTORS, AttentionBuffers
from moqc.schedules.cpu.attention_shape import AttentionShape
from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, store, when
from moqc.schedules.cpu.kv_rows import write_row
from moqc.schedules.cpu.vector import (
    PARALLEL_WORK,
    each_vector,
    fold_rows,
    parallel_if,
    reduce_lanes,
    spread,
    vector_type,
)

_MASKED = -1e30


def attention_kernel(
    shape: AttentionShape, batch: Any, tokens: Any, cache: tuple[Any, Any] | None
) -> tirx.PrimFunc:
    """The kernel of R.moqc.attention (`cache` None) or R.moqc.cached_attention (cache = its batch and slots).

    Arguments, float32 but for positions and caches: q [B,H,S,D], k [B,Hk,S,K], v [B,Hk,S,Dv], positions
    int64 [B,S], k_cache [Bc,Hk,C,K] and v_cache [Bc,Hk,C,Dv] (written in place; dtype and columns as
    `stored` says), sinks [H] if any, out [B,S,H,Dv]; K is `own_width`. `batch` and `tokens` are ints or
    int64 variables. A token's slot is its position; tokens of position < 0 or >= C are not cached, and the
    output of those below 0 is 0.
    """
    with kernel("attention", cached=int(cache is not None)) as k:
        buffers = AttentionBuffers(k, shape, batch, tokens, cache)
        batch, tokens = buffers.batch, buffers.tokens
        pairs = T.alloc_buffer((1,), "int64")
        store(pairs, [0], int64(0) if buffers.cached else batch * tokens * tokens)
        if buffers.cached:
            _write_cache(buffers, pairs)
        blocks = tirx.ceildiv(tokens * shape.group, int64(buffers.rows))
        work = load(pairs, [0]) * (shape.heads * (shape.key_width + shape.value_width))

        def task(index: Any) -> None:
            buffers.allocate()
            outer = bind(index // blocks)
            _task(buffers, bind(outer // shape.key_heads), bind(outer % shape.key_heads), index % blocks)

        parallel_if(work > PARALLEL_WORK, batch * shape.key_heads * blocks, task)
    return k.finish()


def _write_cache(buffers: AttentionBuffers, pairs: Any) -> None:
    """Copy this call's keys and values to their slots, and count the (query, key) pairs into `pairs`."""
    shape = buffers.shape
    copies = (
        (buffers.k, buffers.keys, shape.own_width, buffers.lanes),
        (buffers.v, buffers.values, shape.value_width, buffers.value_lanes),
    )
    with loop(0, buffers.batch) as b, loop(0, buffers.tokens) as s:
        position = bind(load(buffers.positions, [b, s]))
        with when(tirx.all(position >= 0, position < int64(buffers.slots))):
            span = position + 1 if shape.window == 0 else tirx.min(position + 1, int64(shape.window))
            store(pairs, [0], load(pairs, [0]) + span)
            with loop(0, shape.key_heads) as head:
                for source, target, width, lanes in copies:
                    write_row((target, [b, head, position]), (source, [b, head, s]), width, lanes)


def _task(buffers: AttentionBuffers, b: Any, head: Any, block: Any) -> None:
    """Attention of the rows of block `block` of one batch entry and key head."""
    first = bind(block * buffers.rows)
    count = bind(tirx.min(int64(buffers.rows), buffers.tokens * buffers.shape.group - first))
    _start_rows(buffers, b, head, first, count)
    low, high = (bind(int64(load(buffers.bounds, [i]))) for i in range(2))
    # When no row attends anything the extent is negative, and the loop runs zero times.
    with loop(0, (high - low + (KEYS - 1)) // KEYS) as step:
        start = bind(low + step * KEYS)
        keys = bind(tirx.min(int64(KEYS), high - start))
        buffers.unpack((b, head), start, keys)
        with loop(0, count) as row:
            _score_row(buffers, (b, head), row, start, keys, high)
            _renormalize(buffers, row, keys)
        full = bind(count // REGISTER_ROWS)
        with loop(0, full) as quad:
            _accumulate(buffers, (b, head), quad * REGISTER_ROWS, REGISTER_ROWS, start, keys)
        with loop(full * REGISTER_ROWS, count) as row:
            _accumulate(buffers, (b, head), row, 1, start, keys)
    with loop(0, count) as row:
        _finish_row(buffers, b, head, first, row)


def _start_rows(buffers: AttentionBuffers, b: Any, head: Any, first: Any, count: Any) -> None:
    """Load the queries, times the scale; reset the accumulators; find the range of slots the rows attend."""
    shape, bounds = buffers.shape, buffers.bounds
    store(bounds, [0], T.int32(2**31 - 1 if buffers.cached else 0))
    store(bounds, [1], T.int32(0) if buffers.cached else tirx.Cast("int32", buffers.tokens))
    with loop(0, count) as row:
        token, query = _token(buffers, head, first, row)
        position = bind(tirx.Cast("int32", load(buffers.positions, [b, token])))
        store(buffers.place, [row], position)
        with each_vector(shape.key_width, buffers.lanes) as d:
            store(buffers.scaled, [row, d], load(buffers.q, [b, query, token, d], buffers.kind) * shape.scale)
        with each_vector(shape.value_width, buffers.value_lanes) as d:
            store(buffers.sums, [row, d], spread(0.0, buffers.value_lanes))
        store(buffers.total, [row, 0], spread(0.0, buffers.lanes))
        if buffers.sinks is None:
            store(buffers.top, [row], T.float32(_MASKED))
        else:
            store(buffers.top, [row], load(buffers.sinks, [query]))
            store(buffers.total, [row, 0], T.float32(1.0))
        reach = bind(_first_seen(shape, position))
        store(buffers.reach, [row], reach)
        if buffers.cached:
            with when(position >= 0):
                store(bounds, [0], tirx.min(load(bounds, [0]), reach))
                end = tirx.min(position + 1, tirx.Cast("int32", int64(buffers.slots)))
                store(bounds, [1], tirx.max(load(bounds, [1]), end))


def _first_seen(shape: AttentionShape, position: Any) -> Any:
    """The first position that a token at `position` attends."""
    first = T.int32(0)
    if shape.window:
        first = tirx.max(position - (shape.window - 1), first)
    if shape.chunk:
        first = tirx.max(position - tirx.truncmod(position, T.int32(shape.chunk)), first)
    return first


def _token(buffers: AttentionBuffers, head: Any, first: Any, row: Any) -> tuple[Any, Any]:
    """The token and the query head of a row."""
    group = buffers.shape.group
    return bind((first + row) // group), bind(head * group + (first + row) % group)


def _score_row(
    buffers: AttentionBuffers, where: tuple[Any, Any], row: Any, start: Any, keys: Any, end: Any
) -> None:
    """Masked scores of one row against `keys` slots from `start` on, and their maximum per lane in `best`."""
    shape, lanes, kind = buffers.shape, buffers.lanes, buffers.kind
    store(buffers.best, [0], spread(_MASKED, lanes))
    with loop(0, tirx.ceildiv(keys, int64(lanes))) as tile:
        base = bind(start + tile * lanes)
        for i, total in enumerate(buffers.tile):
            # A slot past the end reads the last one; the mask discards it.
            key = bind(tirx.min(tile * lanes + i, keys - 1))
            store(total, [0], spread(0.0, lanes))
            for keys_at, first, width in buffers.key_parts():
                with each_vector(width, lanes) as d:
                    query = load(buffers.scaled, [row, d + first], kind)
                    product = load(keys_at, [*buffers.at(where, start, key), d], kind) * query
                    store(total, [0], load(total, [0], kind) + product)
        score = bind(fold_rows(buffers.tile, lanes))
        if shape.softcap:
            score = tanh(score * (1.0 / shape.softcap)) * shape.softcap
        seen = _visible(buffers, where[0], row, base, end)
        score = bind(tirx.Select(seen, score, spread(_MASKED, lanes)))
        store(buffers.scores, [row, tile * lanes], score)
        store(buffers.best, [0], tirx.max(load(buffers.best, [0], kind), score))


def _visible(buffers: AttentionBuffers, b: Any, row: Any, base: Any, end: Any) -> Any:
    """Which of the `lanes` slots from `base` on the row attends."""
    shape, lanes = buffers.shape, buffers.lanes
    query, none = spread(load(buffers.place, [row]), lanes), spread(0, lanes, "int32")
    first = tirx.Cast("int32", base)
    slots = first if lanes == 1 else T.ramp(first, T.int32(1), lanes)
    if buffers.cached:
        position, seen = slots, slots >= none
    else:
        # The slots of this call's own keys hold any positions, also -1.
        with T.unroll(int64(0), int64(lanes)) as i:
            place = load(buffers.positions, [b, tirx.min(base + i, end - 1)])
            store(buffers.gathered, [i], tirx.Cast("int32", place))
        position = load(buffers.gathered, [0], vector_type(lanes, "int32"))
        inside = slots < spread(tirx.Cast("int32", end), lanes)
        seen = inside & (position >= none) & (query >= none)
    if shape.causal:
        seen = seen & (position <= query)
    if shape.bounded:
        seen = seen & (position >= spread(load(buffers.reach, [row]), lanes))
    return seen


def _renormalize(buffers: AttentionBuffers, row: Any, keys: Any) -> None:
    """Turn the row's scores into weights relative to the new maximum, and rescale what was summed so far."""
    lanes, kind, wide = buffers.lanes, buffers.kind, buffers.value_lanes
    top = bind(load(buffers.top, [row]))
    peak = bind(tirx.max(top, reduce_lanes(buffers.best, lanes, tirx.max)))
    factor = bind(exp(top - peak))
    store(buffers.top, [row], peak)
    store(buffers.total, [row, 0], load(buffers.total, [row, 0], kind) * spread(factor, lanes))
    with loop(0, tirx.ceildiv(keys, int64(lanes))) as tile:
        score = bind(load(buffers.scores, [row, tile * lanes], kind))
        seen = score > spread(_MASKED / 10, lanes)
        weight = bind(tirx.Select(seen, exp(score - spread(peak, lanes)), spread(0.0, lanes)))
        store(buffers.scores, [row, tile * lanes], weight)
        store(buffers.total, [row, 0], load(buffers.total, [row, 0], kind) + weight)
    with each_vector(buffers.shape.value_width, wide) as d:
        store(buffers.sums, [row, d], load(buffers.sums, [row, d], buffers.value_kind) * spread(factor, wide))


def _accumulate(
    buffers: AttentionBuffers, where: tuple[Any, Any], row: Any, rows: int, start: Any, keys: Any
) -> None:
    """Add weight x value of `keys` slots to the sums of `rows` rows, held in registers meanwhile."""
    lanes, kind, width = buffers.value_lanes, buffers.value_kind, buffers.shape.value_width
    for first in range(0, width, REGISTER_VECTORS * lanes):
        span = min(REGISTER_VECTORS * lanes, width - first)
        registers = list(enumerate(buffers.registers[:rows]))
        for r, total in registers:
            with each_vector(span, lanes) as d:
                store(total, [d], load(buffers.sums, [row + r, d + first], kind))
        with loop(0, keys) as key:
            for r, total in registers:
                weight = bind(spread(load(buffers.scores, [row + r, key]), lanes))
                with each_vector(span, lanes) as d:
                    place = (*buffers.at(where, start, key), d + first)
                    value = load(buffers.value_rows, place, kind)
                    store(total, [d], load(total, [d], kind) + weight * value)
        for r, total in registers:
            with each_vector(span, lanes) as d:
                store(buffers.sums, [row + r, d + first], load(total, [d], kind))


def _finish_row(buffers: AttentionBuffers, b: Any, head: Any, first: Any, row: Any) -> None:
    """Divide by the softmax's denominator; a row that attended nothing is 0."""
    lanes, wide = buffers.lanes, buffers.value_lanes
    store(buffers.best, [0], load(buffers.total, [row, 0], buffers.kind))
    total = bind(reduce_lanes(buffers.best, lanes, lambda one, other: one + other))
    scale = bind(tirx.Select(total > 0.0, 1.0 / total, T.float32(0.0)))
    token, query = _token(buffers, head, first, row)
    with each_vector(buffers.shape.value_width, wide) as d:
        value = load(buffers.sums, [row, d], buffers.value_kind) * spread(scale, wide)
        store(buffers.out, [b, token, query, d], value)
