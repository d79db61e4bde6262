"""The few words the CPU kernels are written in, on top of TVM's IRBuilder.

A kernel is emitted by plain Python: loops of Python are unrolled, `loop` and `parallel` stay loops. Values
that are used twice are bound to variables (`bind`), so the code is in SSA form; what changes in a loop lives
in `scratch` vectors, which LLVM keeps in registers. Indices are int64 throughout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.s_tir.stmt import SBlock, SBlockRealize
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

Index = Any
"""A Python int, or a scalar integer expression."""


def int64(value: Index) -> Any:
    """`value` as an int64 expression."""
    if isinstance(value, int):
        return tirx.const(value, "int64")
    return value if str(value.ty.dtype) == "int64" else tirx.Cast("int64", value)


def ceildiv(value: int, divisor: int) -> int:
    """`value / divisor`, rounded up."""
    return -(-value // divisor)


class Kernel:
    """A PrimFunc being emitted; `finish` gives it once the `kernel` block has ended."""

    def __init__(self, builder: IRBuilder) -> None:
        self._builder = builder

    def parameter(self, name: str, shape: Sequence[Index], dtype: str) -> Any:
        """Declare the next parameter, a buffer."""
        extents = [int64(extent) for extent in shape]
        buffer = T.match_buffer(T.arg(name, T.handle()), extents, dtype)
        return IRBuilder.name(name, buffer)

    def finish(self) -> tirx.PrimFunc:
        """The function, private: the caller names it in a module. Relax's passes expect a root block."""
        function = self._builder.get()
        root = SBlock([], [], [], "root", function.body)
        return function.with_body(SBlockRealize([], True, root))


@contextmanager
def kernel(kind: str, **facts: Any) -> Iterator[Kernel]:
    """Emit a scheduled kernel of `kind`; `facts` describe it in the attribute ``moqc.kernel``."""
    builder = IRBuilder()
    with builder, T.prim_func(is_private=True, s_tir=True):
        T.func_attr(
            {
                "tirx.noalias": True,
                "tirx.is_scheduled": True,
                "op_pattern": 8,  # opaque: FuseOps leaves it alone
                "moqc.kernel": {"kind": kind, **facts},
            }
        )
        yield Kernel(builder)


def symbol(name: str) -> tirx.Var:
    """A symbolic extent."""
    return tirx.Var(name, "int64")


def loop(begin: Index, end: Index) -> Any:
    """Repeat the body serially, for the indices from `begin` to before `end`."""
    return T.serial(int64(begin), int64(end))


def parallel(extent: Index) -> Any:
    """A loop the threads share, cut into contiguous ranges."""
    return T.parallel(int64(0), int64(extent))


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements under a condition."""
    with T.If(condition), T.Then():
        yield


def bind(value: Any) -> Any:
    """Evaluate `value` here, once; the variable that holds it."""
    return T.bind(value)


def hold(value: Any) -> Any:
    """Evaluate a vector here, once, where TVM's simplifier does not look: a load of what was stored.

    It looks through bound variables, twice as long for every level of sums of sums: the five rounds of a
    Hadamard transform of eight vectors took it 200 s, held they take it 1 s.
    """
    lanes, dtype = value.ty.dtype.lanes, value.ty.dtype.with_lanes(1)
    buffer = scratch(lanes, str(dtype))
    store(buffer, [0], value)
    return load(buffer, [0], str(value.ty.dtype))


def scratch(lanes: int, dtype: str = "float32") -> Any:
    """A small local buffer of `lanes` elements; one that is only used as a whole vector becomes a register.

    The scope is not ``local``: TVM takes that from its workspace pool, which costs two calls and stores.
    """
    return T.alloc_buffer((lanes,), dtype)


def workspace(size: Index, dtype: str) -> Any:
    """A thread's own buffer in memory."""
    return T.alloc_buffer((size,), dtype, scope="global")


def load(buffer: Any, indices: Sequence[Index], dtype: str | None = None) -> Any:
    """Read an element, or with a vector `dtype` as many consecutive ones of the last axis."""
    return buffer.vload([int64(index) for index in indices], dtype or buffer.dtype)


def store(buffer: Any, indices: Sequence[Index], value: Any) -> None:
    """Write a scalar, or a vector to consecutive elements of the last axis."""
    *lead, last = [int64(index) for index in indices]
    lanes = value.ty.dtype.lanes
    T.buffer_store(buffer, value, [*lead, last if lanes == 1 else T.ramp(last, int64(1), lanes)])


def prefetch(buffer: Any, indices: Sequence[Index], *, near: bool = True) -> None:
    """Ask for the cache line of an element soon to be read; an address outside the buffer does no harm.

    Not `near`: into the second-level cache, which can wait for more lines at a time than the first.
    """
    address = T.address_of(buffer[tuple(int64(index) for index in indices)])
    hint = [T.int32(0), T.int32(3 if near else 2), T.int32(1)]  # for reading, into which caches, data
    T.evaluate(T.call_llvm_intrin(T.llvm_lookup_intrinsic_id("llvm.prefetch"), address, *hint, dtype="void"))


def broadcast(value: Any, lanes: int) -> Any:
    """A vector of `lanes` copies."""
    return T.broadcast(value, lanes)


def splat(value: float, lanes: int, dtype: str = "float32") -> Any:
    """A constant vector."""
    return T.broadcast(tirx.const(value, dtype), lanes)


def intrinsic(dtype: str, name: str, *arguments: Any) -> Any:
    """Call an LLVM intrinsic without side effects."""
    return tirx.call_llvm_pure_intrin(dtype, name, *arguments)


def unravel(index: Any, extents: Sequence[Index]) -> list[Any]:
    """The coordinates of a flat `index` in a tensor of shape `extents`."""
    coordinates: list[Any] = []
    for extent in reversed(extents[1:]):
        coordinates.append(tirx.truncmod(index, int64(extent)))
        index = tirx.truncdiv(index, int64(extent))
    return [index, *reversed(coordinates)]
