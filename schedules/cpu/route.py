"""Sort (token, expert) pairs by expert, so that an expert's tokens are consecutive rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax, tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, scratch, store, symbol, when


def route_kernel(experts: int, top_k: int, dtype: str) -> tirx.PrimFunc:
    """Build the counting sort of ids ``[T, top_k]`` of type `dtype`.

    Parameters of the PrimFunc: ids, and the outputs, all int32:

    * order ``[T * top_k]``: flat pair numbers, sorted by expert, stable. Pairs with an id outside
      ``0 .. experts - 1`` come last and belong to no expert.
    * starts ``[experts + 1]``: expert e owns ``order[starts[e] : starts[e + 1]]``.
    * active ``[experts + 1]``: the number of experts hit, then these experts in rising order.
    """
    with kernel("route", experts=experts, top_k=top_k) as k:
        tokens = symbol("t")
        ids = k.parameter("ids", [tokens, top_k], dtype)
        order = k.parameter("order", [tokens * top_k], "int32")
        starts = k.parameter("starts", [experts + 1], "int32")
        active = k.parameter("active", [experts + 1], "int32")
        # next[e + 1] counts expert e first and is then its write position; the last entry takes strays.
        position = scratch(experts + 2, "int32")
        with loop(0, experts + 2) as e:
            store(position, [e], T.int32(0))

        def bucket(pair: Any) -> Any:
            at = [T.truncdiv(pair, int64(top_k)), T.truncmod(pair, int64(top_k))]
            chosen = bind(load(ids, at).astype("int64"))
            known = tirx.all(chosen >= int64(0), chosen < int64(experts))
            return bind(T.if_then_else(known, chosen, int64(experts)))

        with loop(0, tokens * top_k) as pair:
            slot = bucket(pair)
            store(position, [slot + 1], load(position, [slot + 1]) + 1)
        _scan(experts, position, starts, active)
        with loop(0, tokens * top_k) as pair:
            slot = bucket(pair)
            target = bind(load(position, [slot]))
            store(order, [target], pair.astype("int32"))
            store(position, [slot], target + 1)
    return k.finish()


def _scan(experts: int, position: Any, starts: Any, active: Any) -> None:
    """Turn counts (shifted by one) into write positions, and fill `starts` and `active`."""
    hit = scratch(1, "int32")
    store(hit, [0], T.int32(0))
    store(starts, [0], T.int32(0))
    with loop(0, experts) as e:
        count = bind(load(position, [e + 1]))
        end = bind(load(starts, [e]) + count)
        store(starts, [e + 1], end)
        store(position, [e + 1], end)
        with when(count > 0):
            number = bind(load(hit, [0]) + 1)
            store(hit, [0], number)
            store(active, [number], e.astype("int32"))
    store(active, [0], load(hit, [0]))


def lower_route(bb: relax.BlockBuilder, ids: relax.Expr, experts: int) -> Sequence[relax.Expr]:
    """Emit the sort of the pairs of ``ids [T, top_k]``: order, starts, active."""
    tokens, top_k = ids.ty.shape[0], int(ids.ty.shape[1])
    function = bb.add_func(route_kernel(experts, top_k, str(ids.ty.dtype)), "moqc_route")
    shapes = [[tokens * top_k], [experts + 1], [experts + 1]]
    sorted_pairs = bb.emit(relax.call_tir(function, [ids], [relax.TensorType(s, "int32") for s in shapes]))
    return [bb.emit(relax.TupleGetItem(sorted_pairs, number)) for number in range(3)]
