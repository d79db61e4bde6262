"""The machine's read bandwidth, measured with code compiled as the kernels are: a decode step's limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx

from moqc.schedules.cpu.emit import bind, kernel, load, loop, parallel, scratch, splat, store
from moqc.targets import Target

_STREAMS = 64
"""Contiguous pieces the buffer is read in, handed to the threads in order."""
_VECTORS = 8


def read_bandwidth(target: Target, size: int) -> Callable[[], float]:
    """A function that reads a buffer of `size` bytes once on all threads of TVM's pool: bytes per second.

    Raises nothing of its own; the buffer is touched first, so that no page fault is timed.
    """
    lanes = target.vector_lanes
    words = size // 4 // (_STREAMS * _VECTORS * lanes) * (_STREAMS * _VECTORS * lanes)
    builder = relax.BlockBuilder()
    buffer = relax.Var("buffer", relax.TensorType([words], "int32"))
    with builder.function("read", [buffer]):
        function = builder.add_func(_read_kernel(words, lanes), "read_kernel")
        call = relax.call_tir(function, [buffer], relax.TensorType([_STREAMS, lanes], "int32"))
        builder.emit_func_output(builder.emit(call))
    machine = relax.VirtualMachine(tvm.compile(builder.get(), tvm.target.Target(target.tvm)), tvm.cpu())
    read = machine["read"]
    data = tvm.runtime.tensor(np.ones(words, np.int32))

    def measure() -> float:
        start = time.perf_counter()
        read(data)
        return 4 * words / (time.perf_counter() - start)

    return measure


def _read_kernel(words: int, lanes: int) -> tirx.PrimFunc:
    """Combine all words of a buffer: nothing but loads, and one cheap operation for each."""
    dtype, piece = f"int32x{lanes}", words // _STREAMS
    with kernel("read") as k:
        buffer = k.parameter("buffer", [words], "int32")
        out = k.parameter("out", [_STREAMS, lanes], "int32")
        with parallel(_STREAMS) as stream:
            totals = [scratch(lanes, "int32") for _ in range(_VECTORS)]
            for total in totals:
                store(total, [0], splat(0, lanes, "int32"))
            with loop(0, piece // (_VECTORS * lanes)) as step:
                for number, total in enumerate(totals):
                    at = stream * piece + (step * _VECTORS + number) * lanes
                    store(total, [0], load(total, [0], dtype) | load(buffer, [at], dtype))
            result: Any = None
            for total in totals:
                value = bind(load(total, [0], dtype))
                result = value if result is None else result | value
            store(out, [stream, 0], result)
    return k.finish()
