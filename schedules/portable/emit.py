"""What kernels of plain work-groups need on top of the words of `moqc.schedules.cpu.emit`.

A work-group is `THREADS` threads in one dimension: no sub-groups, no tensor cores, no textures. Storage is
32-bit words, float32 and int32, all that WGSL has everywhere; `half` reads what is stored as float16. Only
registers are `REAL`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import Index, ceildiv, int64, loop, when

THREADS = 64
"""Threads of a work-group: a wave of Adreno, four warps of Mali's 16, and what every WebGPU adapter has."""
REAL = "float16"
"""The type weights are decoded to and multiplied in. In generated sources it is `REAL_NAME`, which a host
defines as what its device has: 16-bit floats, or else 32-bit ones."""
REAL_NAME = "moqc_real"
LOST = "moqc_lost"
"""Function that comes with `REAL_NAME`: whether a sum, as float32, was more than `REAL` holds; 0 or 1."""
HALF = "moqc_half"
"""Function of the sources' preamble: (word, upper) -> the float16 in its lower or upper half as float32."""


@contextmanager
def groups(x: Index, y: Index = 1) -> Iterator[tuple[Any, Any, Any]]:
    """One launch of ``x * y`` work-groups: the group's coordinates and the thread's number."""
    with (
        T.launch_thread("blockIdx.x", _extent(x)) as bx,
        T.launch_thread("blockIdx.y", _extent(y)) as by,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        yield int64(bx), int64(by), int64(thread)


def _extent(extent: Index) -> Any:
    return int64(extent) if isinstance(extent, int) else extent


@contextmanager
def each(total: Index) -> Iterator[Any]:
    """One launch with a thread for each number below `total`."""
    with groups(tirx.ceildiv(int64(total), int64(THREADS))) as (group, _, thread):
        number = T.bind(group * THREADS + thread)
        with when(number < int64(total)):
            yield number


def shared(size: int, dtype: str = "float32") -> Any:
    """Memory of the work-group."""
    return T.alloc_buffer((size,), dtype, scope="shared")


def local(size: int, dtype: str = "float32") -> Any:
    """Registers of a thread: index it with constants only."""
    return T.alloc_buffer((size,), dtype, scope="local")


def barrier() -> None:
    """Wait for the work-group; what it wrote to shared memory is then seen by all. Only in uniform code."""
    T.evaluate(T.tvm_storage_sync("shared"))


@contextmanager
def strided(thread: Any, total: int, step: int = THREADS) -> Iterator[Any]:
    """Repeat the body for ``thread, thread + step, ...`` below `total`."""
    with loop(0, ceildiv(total, step)) as turn:
        number = T.bind(turn * step + thread)
        if total % step:
            with when(number < total):
                yield number
        else:
            yield number


def divide(value: Any, divisor: Index) -> Any:
    """The quotient of numbers that are not negative, rounded down."""
    return tirx.truncdiv(value, int64(divisor))


def modulo(value: Any, divisor: Index) -> Any:
    """The remainder of numbers that are not negative."""
    return tirx.truncmod(value, int64(divisor))


def half(word: Any, upper: Any) -> Any:
    """The float16 in the lower (`upper` 0) or upper (1) half of a 32-bit `word`, as float32."""
    return T.call_pure_extern("float32", HALF, word, upper)


def cast(value: Any, dtype: str) -> Any:
    """`value` as a `dtype`."""
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def product(extents: Any) -> Any:
    """The number of elements of a tensor of these extents."""
    total: Any = int64(1)
    for extent in extents:
        total = total * extent
    return total
