"""Run a compiled model's launches on an OpenCL device, through pyopencl."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqc.errors import TargetError, UserError
from moqc.launches import Buffer, Launches, Precision, Program, evaluate
from moqc.runtime.device import Decoder, Main
from moqc.tensorfile import StoredTensor

Array = NDArray[Any]


class Memory:
    """A tensor on the device: `buffer` is OpenCL's."""

    def __init__(self, buffer: Any, shape: Sequence[int]) -> None:
        self.buffer, self.shape = buffer, tuple(shape)


class OpenCl:
    """The first OpenCL device, with a queue of its own; see `moqc.runtime.device.Device`.

    `precision` is what its kernels multiply in: "float16" where it has `cl_khr_fp16`, else "float32".
    """

    def __init__(self) -> None:
        self._cl = _import_pyopencl()
        self.handle = _first_device(self._cl)
        self.context = self._cl.Context([self.handle])
        self.queue = self._cl.CommandQueue(self.context)
        has_half = "cl_khr_fp16" in self.handle.extensions.split()
        self.precision: Precision = "float16" if has_half else "float32"

    def put(self, array: Array) -> Memory:
        """A tensor with the content of `array`; integers become 32 bits wide."""
        narrow = array.astype(np.int32) if array.dtype == np.int64 else array
        data = np.ascontiguousarray(narrow)
        flags = self._cl.mem_flags.READ_WRITE | self._cl.mem_flags.COPY_HOST_PTR
        return Memory(self._cl.Buffer(self.context, flags, hostbuf=data), data.shape)

    def filled(self, shape: Sequence[int], dtype: str, fill: Callable[[Array], None]) -> Memory:
        """See `Device`."""
        array: Array = np.empty(shape, dtype)
        fill(array)
        return self.put(array)

    def stored(self, source: StoredTensor, dtype: str) -> Array:
        """The values of a file's tensor, still on the host: several make one buffer."""
        if source.data.dtype == dtype:
            return source.data
        array: Array = np.empty(source.data.shape, dtype)
        source.copy_to(array)
        return array

    def zeros(self, shape: Sequence[int], dtype: str) -> Memory:
        """See `Device`."""
        return self.filled(shape, dtype, lambda array: array.fill(0))

    def allocate(self, size: int) -> Any:
        """A buffer of `size` bytes."""
        return self._cl.Buffer(self.context, self._cl.mem_flags.READ_WRITE, size)

    def write(self, buffer: Any, offset: int, array: Array) -> None:
        """Copy an array into a buffer, from byte `offset` on."""
        data = np.ascontiguousarray(array)
        self._cl.enqueue_copy(self.queue, buffer, data, dst_offset=offset)

    def group(self, tensors: Sequence[Any]) -> Any:
        """See `Device`."""
        return list(tensors)

    def get(self, tensor: Memory, first: int, count: int) -> Array:
        """See `Device`."""
        array = np.empty(count, np.float32)
        self._cl.enqueue_copy(self.queue, array, tensor.buffer, src_offset=4 * first)
        return array

    def decoder(
        self, main: Main, advance: Main | None, weights: Any, caches: Any, rows: int
    ) -> Decoder | None:
        """See `Device`."""
        return None

    def kernels(self, launches: Launches, names: Sequence[str]) -> dict[str, Any]:
        """The compiled kernels of these names."""
        built, before = {}, launches.types[self.precision] + launches.preamble
        for name in names:
            text = before + launches.kernels[name].source
            with warnings.catch_warnings(category=self._cl.CompilerWarning, action="ignore"):
                program = self._cl.Program(self.context, text).build()  # some drivers report what went well
            built[name] = self._cl.Kernel(program, name)
        return built

    def launch(self, kernel: Any, groups: Sequence[int], threads: Sequence[int], *arguments: Any) -> None:
        """Queue one launch."""
        size = [count * width for count, width in zip(groups, threads, strict=True)]
        kernel(self.queue, size, list(threads), *arguments)


class LaunchedFunction:
    """A program as a function of (inputs..., weights, caches), like `main` of TVM's virtual machine."""

    def __init__(self, device: OpenCl, launches: Launches, program: Program) -> None:
        self._device, self._program = device, program
        self._threads = {name: kernel.threads for name, kernel in launches.kernels.items()}
        names = {launch.kernel for launch in program.launches}
        self._kernels = device.kernels(launches, sorted(names))
        self._buffers = [self._allocate(buffer) for buffer in program.buffers]
        self._filled: Any = None

    def __call__(self, *arguments: Any) -> list[Memory]:
        """Run it on tensors of the device; the results."""
        *inputs, weights, caches = arguments
        if self._filled is not weights:
            self._fill(weights)
        buffers = [self._buffer(number, inputs, caches) for number in range(len(self._buffers))]
        sizes = self._sizes(inputs)
        for launch in self._program.launches:
            if launch.when is not None and not evaluate(launch.when, sizes):
                continue
            grid = [evaluate(extent, sizes) for extent in launch.grid]
            if 0 in grid:
                continue
            scalars = [np.int32(evaluate(scalar, sizes)) for scalar in launch.scalars]
            chosen = [buffers[number] for number in launch.buffers]
            threads = self._threads[launch.kernel]
            self._device.launch(self._kernels[launch.kernel], grid, threads, *chosen, *scalars)
        return [
            Memory(buffers[output.buffer], [evaluate(extent, sizes) for extent in output.shape])
            for output in self._program.outputs
        ]

    def _allocate(self, buffer: Buffer) -> Any:
        if buffer.role in ("input", "cache"):
            return None
        memory = self._device.allocate(buffer.bytes)
        if buffer.role == "constant":
            self._device.write(memory, 0, np.frombuffer(bytes.fromhex(buffer.constant), np.uint8))
        return memory

    def _fill(self, weights: Mapping[str, Array]) -> None:
        """Put the weights (name -> array) where the kernels read them."""
        for buffer, memory in zip(self._program.buffers, self._buffers, strict=True):
            offset = 0
            for tensor in buffer.weights:
                self._device.write(memory, offset, weights[tensor.name])
                offset += weights[tensor.name].nbytes
        self._filled = weights

    def _buffer(self, number: int, inputs: Sequence[Memory], caches: Sequence[Memory]) -> Any:
        buffer = self._program.buffers[number]
        if buffer.role == "input":
            return inputs[buffer.number].buffer
        if buffer.role == "cache":
            return caches[buffer.number].buffer
        return self._buffers[number]

    def _sizes(self, inputs: Sequence[Memory]) -> dict[str, int]:
        """The variables, from the shapes of the inputs."""
        sizes: dict[str, int] = {}
        for buffer in self._program.buffers:
            if buffer.role == "input":
                actual = inputs[buffer.number].shape
                sizes |= {
                    name: extent
                    for name, extent in zip(buffer.shape, actual, strict=True)
                    if isinstance(name, str)
                }
        for name, extent in sizes.items():
            if extent > self._program.variables[name]:
                raise UserError(
                    f"{name} {extent}: this artifact was compiled for {self._program.variables[name]}"
                )
        return sizes


def _import_pyopencl() -> Any:
    try:
        import pyopencl
    except ImportError as error:
        raise TargetError(
            "running an OpenCL artifact from Python needs pyopencl: `pip install pyopencl`, and a driver, "
            "such as `apt install pocl-opencl-icd ocl-icd-libopencl1` for CPUs"
        ) from error
    return pyopencl


def _first_device(cl: Any) -> Any:
    """A device of the first platform that has one."""
    try:
        for platform in cl.get_platforms():
            if devices := platform.get_devices():
                return devices[0]
    except cl.Error as error:
        raise TargetError(f"no OpenCL driver ({error}): `apt install pocl-opencl-icd`") from error
    raise TargetError("no OpenCL device: install the driver of yours, or `apt install pocl-opencl-icd`")
