"""Building blocks of hand-written CPU kernels, used under an open `tvm.script` IRBuilder.

Extents and indices are int64 throughout: Relax's symbolic dimensions are, and TVM refuses to mix widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

PARALLEL_WORK = 1 << 20
"""Multiply-adds below which a loop stays on the calling thread: about 35 µs, and waking the pool costs 20."""


def int64(value: int | tirx.Expr) -> tirx.Expr:
    """`value` as an int64 expression."""
    return tirx.const(value, "int64") if isinstance(value, int) else tirx.Cast("int64", value)


def common_lanes(lanes: int, *extents: int) -> int:
    """The widest vector, up to `lanes` (a power of two), that divides every one of `extents`."""
    return math.gcd(lanes, *extents)


def load(buffer: Any, *indices: Any, lanes: int) -> tirx.Expr:
    """`lanes` consecutive elements of `buffer` from `indices` on."""
    *outer, last = indices
    return buffer[tuple(indices)] if lanes == 1 else buffer[(*outer, tirx.Ramp(last, int64(1), lanes))]


def store(buffer: Any, value: Any, *indices: Any, lanes: int) -> None:
    """Write the vector `value` to `buffer` from `indices` on."""
    *outer, last = indices
    place = last if lanes == 1 else tirx.Ramp(last, int64(1), lanes)
    T.buffer_store(buffer, value, [*outer, place])


def splat(value: tirx.Expr, lanes: int) -> tirx.Expr:
    """`value` in every lane."""
    return value if lanes == 1 else tirx.Broadcast(value, lanes)


def zeros(lanes: int) -> tirx.Expr:
    """float32 zeros."""
    return splat(tirx.const(0.0, "float32"), lanes)


def local(shape: tuple[int, ...], dtype: str = "float32") -> Any:
    """A scratch buffer of this thread; one that is small and indexed by constants ends up in registers."""
    return T.alloc_buffer(shape, dtype, scope="local")


@contextmanager
def opaque(name: str) -> Iterator[None]:
    """A block no schedule looks into: the place for `local` buffers."""
    with T.sblock(name):
        T.reads([])
        T.writes([])
        yield


@contextmanager
def each_vector(extent: int, lanes: int) -> Iterator[tirx.Expr]:
    """An unrolled loop over the starts 0, lanes, ... below `extent`, which `lanes` divides.

    Loops are unrolled by TVM and not while building: its passes are slow on long bodies.
    """
    with T.unroll(int64(0), int64(extent // lanes)) as index:
        yield index * lanes


def parallel_if(condition: tirx.Expr, extent: tirx.Expr, body: Callable[[tirx.Expr], None]) -> None:
    """Run `body(i)` for i in 0..extent, on the thread pool when `condition` holds."""
    with T.If(condition):
        with T.Then(), T.parallel(int64(0), extent) as index:
            body(index)
        with T.Else(), T.serial(int64(0), extent) as index:
            body(index)


def fold_rows(rows: Any, lanes: int) -> tirx.Expr:
    """Sums of the `lanes` vectors in `rows` (local [lanes, lanes], overwritten): lane i is the sum of row i.

    A tree of log2(lanes) levels: each adds the halves of two vectors' segments into one vector.
    """
    count, segment = lanes, lanes
    while count > 1:
        half = segment // 2
        starts = [start for start in range(0, 2 * lanes, segment)]
        low = [start + i for start in starts for i in range(half)]
        high = [start + half + i for start in starts for i in range(half)]
        for i in range(count // 2):
            pair = [load(rows, int64(2 * i + j), int64(0), lanes=lanes) for j in range(2)]
            store(rows, _shuffle(pair, low) + _shuffle(pair, high), int64(i), int64(0), lanes=lanes)
        count, segment = count // 2, half
    return load(rows, int64(0), int64(0), lanes=lanes)


def reduce_lanes(vector: Any, lanes: int, combine: Callable[[Any, Any], Any]) -> tirx.Expr:
    """One value from the vector in `vector` (local [lanes], overwritten), by an associative `combine`."""
    width = lanes
    while width > 1:
        width //= 2
        low, high = (load(vector, int64(start), lanes=width) for start in (0, width))
        store(vector, combine(low, high), int64(0), lanes=width)
    return vector[int64(0)]


def _shuffle(vectors: list[tirx.Expr], lanes: list[int]) -> tirx.Expr:
    return tirx.Shuffle(vectors, [tirx.const(lane, "int32") for lane in lanes])
