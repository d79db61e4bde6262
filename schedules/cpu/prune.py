"""Drop the experts of each token that are not worth their work; `moqc.quant.routing` is the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moqc.ir.ops import attributes, operands
from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, scratch, store, symbol
from moqc.schedules.cpu.vector import PARALLEL_WORK, common_lanes, parallel_if, reduce_lanes, vector_type
from moqc.targets import Target

DROPPED = -1
TINY = 1.1754943508222875e-38
"""The smallest normal float32."""


@dataclass(frozen=True)
class PruneShape:
    """What the kernel depends on; the fields are those of `R.moqc.prune_routing`."""

    experts: int
    top_k: int
    hidden: int
    ids: str
    rule: str
    exponent: float
    renormalize: bool
    first: int
    lanes: int


def prune_kernel(shape: PruneShape) -> tirx.PrimFunc:
    """Build the kernel.

    Parameters of the PrimFunc: x float32 [T, H], ids [T, k] of type `shape.ids`, weights float32 [T, k],
    positions int64 [T], strength float32 [E], limits float32 [3] (limit, peak, margin), and the outputs ids
    and weights.
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
        kept_ids = k.parameter("kept_ids", [tokens, count], shape.ids)
        kept_weights = k.parameter("kept_weights", [tokens, count], "float32")

        def token(t: Any) -> None:
            shares = [bind(load(weights, [t, j])) for j in range(count)]
            chosen = [bind(load(ids, [t, j])) for j in range(count)]
            scores = [_score(shape, strength, *pair) for pair in zip(chosen, shares, strict=True)]
            position = bind(load(positions, [t]))
            protected = bind(
                tirx.any(
                    position < int64(shape.first),
                    _largest_input(shape, x, t) > load(limits, [1]),
                    _margin(shares) < load(limits, [2]),
                )
            )
            keep = _keep_mass if shape.rule == "mass" else _keep_ratio
            worth = keep(scores, load(limits, [0]))
            kept = [
                bind(tirx.all(position >= int64(0), score > _f(0), tirx.any(protected, good)))
                for score, good in zip(scores, worth, strict=True)
            ]
            left = [
                bind(T.if_then_else(stays, share, _f(0))) for stays, share in zip(kept, shares, strict=True)
            ]
            factor = _factor(shares, left) if shape.renormalize else None
            for j, stays in enumerate(kept):
                dropped = tirx.const(DROPPED, shape.ids)
                store(kept_ids, [t, j], T.if_then_else(stays, chosen[j], dropped))
                store(kept_weights, [t, j], left[j] if factor is None else left[j] * factor)

        work = tokens * (shape.hidden + 16 * count * count)
        parallel_if(work > PARALLEL_WORK, tokens, token)
    return k.finish()


def _f(value: float) -> Any:
    return tirx.const(value, "float32")


def _sum(values: list[Any]) -> Any:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return bind(total)


def _fold(values: list[Any], combine: Callable[[Any, Any], Any]) -> Any:
    result = values[0]
    for value in values[1:]:
        result = bind(combine(result, value))
    return result


def _score(shape: PruneShape, strength: Any, expert: Any, share: Any) -> Any:
    """The pair's contribution; 0 for an id that is no expert."""
    number = bind(int64(expert))
    known = bind(tirx.all(number >= int64(0), number < int64(shape.experts)))
    at = bind(T.if_then_else(known, number, int64(0)))
    value = bind(T.fabs(share) * load(strength, [at]))
    if shape.exponent != 1.0:
        value = T.pow(value, _f(shape.exponent))
    return bind(T.if_then_else(known, value, _f(0)))


def _keep_mass(scores: list[Any], limit: Any) -> list[Any]:
    """A score stays where those before it, in falling order, are less than `limit` of the sum."""
    bound = bind(limit * _sum(scores))
    result = []
    for j, mine in enumerate(scores):
        before: Any = _f(0)
        for i, other in enumerate(scores):
            if i != j:
                first = other >= mine if i < j else other > mine
                before = bind(before + T.if_then_else(first, other, _f(0)))
        result.append(before < bound)
    return result


def _keep_ratio(scores: list[Any], limit: Any) -> list[Any]:
    bound = bind(limit * _fold(scores, tirx.max))
    return [score >= bound for score in scores]


def _largest_input(shape: PruneShape, x: Any, row: Any) -> Any:
    lanes = common_lanes(shape.lanes, shape.hidden)
    kind = vector_type(lanes)
    largest = scratch(lanes)
    store(largest, [0], T.broadcast(_f(0), lanes) if lanes > 1 else _f(0))
    with loop(0, shape.hidden // lanes) as step:
        value = load(x, [row, step * lanes], kind)
        store(largest, [0], tirx.max(load(largest, [0], kind), tirx.max(value, -value)))
    return bind(reduce_lanes(largest, lanes, tirx.max))


def _margin(shares: list[Any]) -> Any:
    """(largest - second) / (largest + second) of the absolute weights."""
    if len(shares) == 1:
        return _f(1)
    sizes = [bind(T.fabs(share)) for share in shares]
    first, second = bind(tirx.max(sizes[0], sizes[1])), bind(tirx.min(sizes[0], sizes[1]))
    for size in sizes[2:]:
        second = bind(tirx.max(second, tirx.min(first, size)))
        first = bind(tirx.max(first, size))
    return bind((first - second) / tirx.max(first + second, _f(TINY)))


def _factor(shares: list[Any], left: list[Any]) -> Any:
    """By which kept weights grow, so that they sum to what all of them did."""
    total = _sum(left)
    return bind(T.if_then_else(total == _f(0), _f(1), _sum(shares) / total))


def lower_prune_routing(bb: relax.BlockBuilder, call: relax.Call, target: Target) -> relax.Expr:
    """``R.moqc.prune_routing``: one kernel."""
    named, attrs = operands(call), attributes(call)
    shape = PruneShape(
        experts=int(named["strength"].ty.shape[0]),
        top_k=int(named["ids"].ty.shape[1]),
        hidden=int(named["x"].ty.shape[1]),
        ids=str(named["ids"].ty.dtype),
        rule=attrs["rule"],
        exponent=float(attrs["exponent"]),
        renormalize=bool(attrs["renormalize"]),
        first=attrs["first"],
        lanes=target.vector_lanes,
    )
    function = bb.add_func(prune_kernel(shape), "moqc_prune_routing")
    return relax.call_tir(function, list(named.values()), list(call.ty.fields))
