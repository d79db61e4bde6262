"""Drop the experts of each token that are not worth their work; `moqc.quant.routing` is the reference."""

from __future__ import annotations

from typing import Any

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moqc.ir.ops import operands
from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, scratch, store, symbol
from moqc.schedules.cpu.vector import (
    PARALLEL_WORK,
    common_lanes,
    parallel_if,
    reduce_lanes,
    spread,
    vector_type,
)
from moqc.schedules.pruning import PruneShape
from moqc.targets import Target

DROPPED = -1
TINY = 1.1754943508222875e-38
"""The smallest normal float32."""


def prune_kernel(shape: PruneShape, lanes: int) -> tirx.PrimFunc:
    """Build the kernel, with vectors of up to `lanes` float32.

    Parameters of the PrimFunc: x float32 [T, H], ids [T, k] of type `shape.ids`, weights float32 [T, k],
    positions int64 [T], strength float32 [E], limits float32 [3] (limit, peak, margin), with `shape.slopes`
    slopes float16 [E, H], and the outputs ids and weights.
    """
    count = shape.top_k
    with kernel("prune_routing", rule=shape.rule, experts=shape.experts, top_k=count) as k:
        tokens = symbol("t")
        x = k.parameter("x", [tokens, shape.hidden], "float32")
        ids = k.parameter("ids", [tokens, count], shape.ids)
        weights = k.parameter("weights", [tokens, count], "float32")
        positions = k.parameter("positions", [tokens], "int64")
        strength = k.parameter("strength", [shape.experts], "float32")
        limits = k.parameter("limits", [3], "float32")
        size = [shape.experts, shape.hidden]
        slopes = k.parameter("slopes", size, "float16") if shape.slopes else None
        kept_ids = k.parameter("kept_ids", [tokens, count], shape.ids)
        kept_weights = k.parameter("kept_weights", [tokens, count], "float32")

        def token(t: Any) -> None:
            position = bind(load(positions, [t]))
            margin = _margin(count, weights, t)
            unsure = tirx.any(
                _largest_input(x, shape.hidden, lanes, t) > load(limits, [1]), margin < load(limits, [2])
            )
            protected = bind(tirx.any(position < int64(shape.first), unsure))
            scores = _scores(shape, (ids, weights, strength), t)
            if slopes is not None:
                _apply_slopes(shape, scores, (x, ids, slopes), lanes, t)
            bound = _bound(shape, scores, load(limits, [0]))
            totals = scratch(2)  # of all weights, and of those that are left
            _fill(totals, 2, 0.0)
            with loop(0, count) as j:
                score, share = bind(load(scores, [j])), bind(load(weights, [t, j]))
                worth = tirx.any(protected, score >= bound)
                stays = bind(tirx.all(position >= int64(0), score > _f(0), worth))
                left = bind(T.if_then_else(stays, share, _f(0)))
                dropped = tirx.const(DROPPED, shape.ids)
                store(kept_ids, [t, j], T.if_then_else(stays, load(ids, [t, j]), dropped))
                store(kept_weights, [t, j], left)
                store(totals, [0], load(totals, [0]) + share)
                store(totals, [1], load(totals, [1]) + left)
            if shape.renormalize:
                _rescale(count, kept_weights, t, totals)

        work = tokens * (shape.hidden + 16 * count * count)
        parallel_if(work > PARALLEL_WORK, tokens, token)
    return k.finish()


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _fill(vector: Any, count: int, value: float) -> None:
    for at in range(count):
        store(vector, [at], _f(value))


def _expert(shape: PruneShape, ids: Any, t: Any, j: Any) -> tuple[Any, Any]:
    """The expert of a pair, 0 for an id that is none; and whether it is one."""
    number = bind(int64(load(ids, [t, j])))
    known = bind(tirx.all(number >= int64(0), number < int64(shape.experts)))
    return bind(T.if_then_else(known, number, int64(0))), known


def _scores(shape: PruneShape, tensors: tuple[Any, Any, Any], t: Any) -> Any:
    """The contributions of a token's pairs without slopes; 0 for an id that is no expert."""
    ids, weights, strength = tensors
    scores = scratch(shape.top_k)
    with loop(0, shape.top_k) as j:
        at, known = _expert(shape, ids, t, j)
        value = bind(T.fabs(load(weights, [t, j])) * load(strength, [at]))
        if shape.exponent == 2.0:
            value = bind(value * value)
        elif shape.exponent != 1.0:
            value = T.pow(value, _f(shape.exponent))
        store(scores, [j], T.if_then_else(known, value, _f(0)))
    return scores


def _apply_slopes(shape: PruneShape, scores: Any, tensors: tuple[Any, Any, Any], lanes: int, t: Any) -> None:
    """Multiply each score by ``exp(slopes[expert] @ x)``."""
    x, ids, slopes = tensors
    lanes = common_lanes(lanes, shape.hidden)
    kind = vector_type(lanes)
    total = scratch(lanes)
    with loop(0, shape.top_k) as j:
        at, _ = _expert(shape, ids, t, j)
        store(total, [0], spread(0.0, lanes))
        with loop(0, shape.hidden // lanes) as step:
            slope = load(slopes, [at, step * lanes], vector_type(lanes, "float16")).astype(kind)
            product = load(x, [t, step * lanes], kind) * slope
            store(total, [0], load(total, [0], kind) + product)
        gain = T.exp(bind(reduce_lanes(total, lanes, lambda a, b: a + b)))
        store(scores, [j], load(scores, [j]) * gain)


def _bound(shape: PruneShape, scores: Any, limit: Any) -> Any:
    """What a pair must reach: `limit` (mass) or that share of the largest (ratio); the largest reaches it."""
    top = scratch(1)
    _fill(top, 1, 0.0)
    with loop(0, shape.top_k) as j:
        store(top, [0], tirx.max(load(top, [0]), load(scores, [j])))
    largest = bind(load(top, [0]))
    return bind(tirx.min(limit, largest) if shape.rule == "mass" else limit * largest)


def _largest_input(x: Any, hidden: int, lanes: int, row: Any) -> Any:
    lanes = common_lanes(lanes, hidden)
    kind = vector_type(lanes)
    largest = scratch(lanes)
    store(largest, [0], spread(0.0, lanes))
    with loop(0, hidden // lanes) as step:
        value = bind(load(x, [row, step * lanes], kind))
        store(largest, [0], tirx.max(load(largest, [0], kind), tirx.max(value, -value)))
    return bind(reduce_lanes(largest, lanes, tirx.max))


def _margin(count: int, weights: Any, t: Any) -> Any:
    """(largest - second) / (largest + second) of the absolute weights; 1 where there is one only."""
    if count == 1:
        return _f(1)
    top = scratch(2)
    _fill(top, 2, 0.0)
    with loop(0, count) as j:
        size, largest = bind(T.fabs(load(weights, [t, j]))), bind(load(top, [0]))
        store(top, [1], tirx.max(load(top, [1]), tirx.min(largest, size)))
        store(top, [0], tirx.max(largest, size))
    first, second = bind(load(top, [0])), bind(load(top, [1]))
    return bind((first - second) / tirx.max(first + second, _f(TINY)))


def _rescale(count: int, kept: Any, t: Any, totals: Any) -> None:
    """Scale what is left, so that it sums to what all weights did."""
    left = bind(load(totals, [1]))
    factor = bind(T.if_then_else(left == _f(0), _f(1), load(totals, [0]) / left))
    with loop(0, count) as j:
        store(kept, [t, j], load(kept, [t, j]) * factor)


def lower_prune_routing(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.prune_routing``: one kernel."""
    function = bb.add_func(prune_kernel(PruneShape.of(call), target.vector_lanes), "moqc_prune_routing")
    return relax.call_tir(function, list(operands(call).values()), list(call.ty.fields))
