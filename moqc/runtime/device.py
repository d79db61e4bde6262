"""Where a model runs: memory and calls on the CPU or on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moqc.runtime.cuda import Graph, Stream, load_cuda
from moqc.tensorfile import LINE_BYTES, StoredTensor

Array = NDArray[Any]
_VOID = ctypes.c_void_p
Main = Callable[..., Any]


class Device(Protocol):
    """What a session needs."""

    @property
    def handle(self) -> Any:
        """TVM's device."""

    def put(self, array: Array) -> Any:
        """A tensor with the content of `array`."""

    def filled(self, shape: Sequence[int], dtype: str, fill: Callable[[Array], None]) -> Any:
        """A tensor whose content `fill` writes into an array of the host."""

    def stored(self, source: StoredTensor, dtype: str) -> Any:
        """A tensor of type `dtype` with the values of a file's; ArtifactError where that is not exact."""

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """A tensor of zeros."""

    def group(self, tensors: Sequence[Any]) -> Any:
        """Tensors as one argument."""

    def get(self, tensor: Any, first: int, count: int) -> Array:
        """`count` float32 values of a contiguous tensor, from number `first` on."""

    def decoder(
        self, main: Main, advance: Main | None, weights: Any, caches: Any, rows: int
    ) -> Decoder | None:
        """Steps of one token a row that are faster than calls of `main`, or None where there are none."""


class Cpu:
    """The CPU; tensors share memory with arrays."""

    def __init__(self, tvm: ModuleType) -> None:
        self._runtime, self.handle = tvm.runtime, tvm.cpu()

    def put(self, array: Array) -> Any:
        """See `Device`."""
        return self._runtime.tensor(np.ascontiguousarray(array))

    def filled(self, shape: Sequence[int], dtype: str, fill: Callable[[Array], None]) -> Any:
        """See `Device`."""
        tensor = self._runtime.empty(shape, dtype)
        fill(np.from_dlpack(tensor))
        return tensor

    def stored(self, source: StoredTensor, dtype: str) -> Any:
        """See `Device`. The file's pages themselves where they are aligned and of this type, else a copy."""
        data = source.data
        if data.size and data.dtype == dtype and data.ctypes.data % LINE_BYTES == 0:
            return self._runtime.from_dlpack(data)
        return self.filled(data.shape, dtype, source.copy_to)

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """See `Device`."""
        return self.filled(shape, dtype, lambda array: array.fill(0))

    def group(self, tensors: Sequence[Any]) -> Any:
        """See `Device`."""
        return self._runtime.convert(list(tensors))

    def get(self, tensor: Any, first: int, count: int) -> Array:
        """See `Device`."""
        return np.from_dlpack(tensor).reshape(-1)[first : first + count]

    def decoder(
        self, main: Main, advance: Main | None, weights: Any, caches: Any, rows: int
    ) -> Decoder | None:
        """See `Device`."""
        return None


class Cuda:
    """The first GPU, with a stream of its own."""

    def __init__(self, tvm: ModuleType, architectures: Sequence[str]) -> None:
        self._runtime = tvm.runtime
        self.handle = load_cuda(tvm, architectures)
        self.stream = Stream(self.handle)

    def put(self, array: Array) -> Any:
        """See `Device`."""
        return self._runtime.tensor(np.ascontiguousarray(array), self.handle)

    def filled(self, shape: Sequence[int], dtype: str, fill: Callable[[Array], None]) -> Any:
        """See `Device`."""
        array: Array = np.empty(shape, dtype)
        fill(array)
        return self.put(array)

    def stored(self, source: StoredTensor, dtype: str) -> Any:
        """See `Device`."""
        return self.filled(source.data.shape, dtype, source.copy_to)

    def zeros(self, shape: Sequence[int], dtype: str) -> Any:
        """See `Device`."""
        tensor = self._runtime.empty(shape, dtype, self.handle)
        self.stream.clear(tensor, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return tensor

    def group(self, tensors: Sequence[Any]) -> Any:
        """See `Device`."""
        return self._runtime.convert(list(tensors))

    def get(self, tensor: Any, first: int, count: int) -> Array:
        """See `Device`."""
        array = np.empty(count, np.float32)
        self.stream.download(array.ctypes.data_as(_VOID), tensor, array.nbytes, 4 * first)
        return array

    def decoder(
        self, main: Main, advance: Main | None, weights: Any, caches: Any, rows: int
    ) -> Decoder | None:
        """See `Device`."""
        return None if advance is None else Decoder(self, main, advance, weights, caches, rows)


class Decoder:
    """Steps of one token a row on a GPU: one CUDA graph, token ids and positions kept there.

    A step computes logits, chooses each row's likeliest token, and advances the positions, so that the next
    greedy step needs nothing of the host.
    """

    def __init__(self, device: Cuda, main: Main, advance: Main, weights: Any, caches: Any, rows: int) -> None:
        self._stream, self._rows = device.stream, rows
        self._main, self._advance, self._arguments = main, advance, (weights, caches)
        self._ids, self._positions = (device.put(np.zeros((rows, 1), np.int64)) for _ in range(2))
        self._held: tuple[list[int], list[int]] | None = None  # what ids and positions hold
        self._graph: Graph | None = None
        self._calls = 0
        self.logits: Any = None
        """[rows, 1, vocabulary] of the last step, on the device."""

    def step(self, ids: Array, positions: Array) -> Array:
        """Run one token a row, int64 [rows], at `positions` [rows]; the likeliest next tokens, likewise."""
        if self._held != (ids.tolist(), positions.tolist()):
            for tensor, values in ((self._ids, ids), (self._positions, positions)):
                array = np.ascontiguousarray(values, np.int64)
                self._stream.upload(tensor, array.ctypes.data_as(_VOID), array.nbytes)
        if self._graph is None and self._calls > 0:
            # The first call has filled TVM's pools of memory.
            self._graph, self.logits = self._stream.capture(self._run)
        if self._graph is None:
            self.logits = self._run()
        else:
            self._graph.launch()
        self._calls += 1
        chosen = np.empty(self._rows, np.int64)
        self._stream.download(chosen.ctypes.data_as(_VOID), self._ids, chosen.nbytes)
        self._held = (chosen.tolist(), (positions + 1).tolist())
        return chosen

    def _run(self) -> Any:
        logits = self._main(self._ids, self._positions, *self._arguments)[0]
        self._advance(logits, self._ids, self._positions)
        return logits


def open_device(tvm: ModuleType, architectures: Sequence[str]) -> Device:
    """The device of an artifact for these GPU architectures, or for CPUs if there are none."""
    return Cuda(tvm, architectures) if architectures else Cpu(tvm)
