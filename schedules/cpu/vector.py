"""Vectors of float32 in CPU kernels: widths, sums across lanes, loops over vectors. On top of `emit`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import Index, bind, int64, load, loop, parallel, scratch, store

PARALLEL_WORK = 1 << 20
"""Multiply-adds below which a loop stays on its thread: about 35 µs; waking the pool costs up to 20."""


def common_lanes(lanes: int, *extents: int) -> int:
    """The widest vector, up to `lanes` (a power of two), that divides every one of `extents`."""
    return math.gcd(lanes, *extents)


def vector_type(lanes: int, element: str = "float32") -> str:
    """The name of a type of `lanes` elements."""
    return element if lanes == 1 else f"{element}x{lanes}"


def spread(value: Any, lanes: int, element: str = "float32") -> Any:
    """`value`, an expression or a number of type `element`, in every lane."""
    scalar = tirx.const(value, element) if isinstance(value, int | float) else value
    return scalar if lanes == 1 else T.broadcast(scalar, lanes)


@contextmanager
def each_vector(extent: int, lanes: int) -> Iterator[Any]:
    """An unrolled loop over the starts 0, lanes, ... below `extent`, which `lanes` divides.

    TVM unrolls it, after the passes that are slow on long bodies.
    """
    with T.unroll(int64(0), int64(extent // lanes)) as index:
        yield index * lanes


def parallel_if(condition: Any, extent: Index, body: Callable[[Any], None]) -> None:
    """Run `body(i)` for i in 0..extent, on the thread pool when `condition` holds."""
    with T.If(condition):
        with T.Then(), parallel(extent) as index:
            body(index)
        with T.Else(), loop(0, extent) as index:
            body(index)


def fold_rows(rows: Sequence[Any], lanes: int) -> Any:
    """Sums of the vectors in `rows` (`lanes` scratch buffers, overwritten): lane i is the sum of row i.

    A tree of log2(lanes) levels: each adds the halves of two vectors' segments into one vector.
    """
    kind, count, segment = vector_type(lanes), lanes, lanes
    while count > 1:
        half = segment // 2
        starts = range(0, 2 * lanes, segment)
        low = [start + i for start in starts for i in range(half)]
        high = [start + half + i for start in starts for i in range(half)]
        for i in range(count // 2):
            pair = [load(rows[2 * i + j], [0], kind) for j in range(2)]
            store(rows[i], [0], shuffle(pair, low) + shuffle(pair, high))
        count, segment = count // 2, half
    return load(rows[0], [0], kind)


def reduce_lanes(vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> Any:
    """One value from the vector in `vector` (local [lanes], overwritten), by an associative `combine`."""
    width = lanes
    while width > 1:
        width //= 2
        low, high = (load(vector, [start], vector_type(width)) for start in (0, width))
        store(vector, [0], combine(low, high))
    return load(vector, [0])


def block_product(
    weights: Any,
    at: Sequence[Index],
    row: Index,
    last: Index,
    x: Any,
    x_at: Sequence[Index],
    size: tuple[int, int],
) -> Any:
    """Rows `row`.. of the matrix ``weights[*at]`` times the vector ``x[*x_at]``: a vector of `lanes` sums.

    `size` is (columns, lanes); rows past `last` read that one again. Where the columns fit no vector of
    `lanes`, narrower ones do the block in parts.
    """
    columns, lanes = size
    width = common_lanes(lanes, columns)
    kind = vector_type(width)
    # One buffer a row: TVM takes larger ones from a pool, once a block and token.
    sums = [scratch(width) for _ in range(width)]
    folded = scratch(lanes)
    for part in range(0, lanes, width):
        for total in sums:
            store(total, [0], spread(0.0, width))
        with loop(0, columns // width) as step:
            value = bind(load(x, [*x_at, step * width], kind))
            for i, total in enumerate(sums):
                line = tirx.min(row + part + i, int64(last))
                weight = load(weights, [*at, line, step * width], kind)
                store(total, [0], load(total, [0], kind) + weight * value)
        store(folded, [part], fold_rows(sums, width))
    return bind(load(folded, [0], vector_type(lanes)))


def shuffle(vectors: Sequence[Any], lanes: Sequence[int]) -> Any:
    """The vector of lanes `lanes` of `vectors`, taken one after the other as one."""
    return tirx.Shuffle(list(vectors), [tirx.const(lane, "int32") for lane in lanes])
