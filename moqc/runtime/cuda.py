"""What running on an NVIDIA GPU needs beside TVM: its CUDA library, checks of the machine, and CUDA graphs.

Graphs, streams and memory are those of the driver (``libcuda.so.1``), which is on every machine with a GPU.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from moqc.errors import TargetError

RUNTIME = "libcudart.so.13"
_RELAXED = 2
"""CU_STREAM_CAPTURE_MODE_RELAXED: TVM may allocate while a stream is captured."""


def absent_gpu() -> str | None:
    """Why there is no GPU here, or None where there is one."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no driver here (libcuda.so.1)"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the driver finds none here"
    return None


def load_cuda(tvm: ModuleType, architectures: Sequence[str]) -> Any:
    """TVM's device for the first GPU, after loading TVM's CUDA library.

    Raises TargetError when there is no driver, no GPU, or none that code for `architectures` runs on.
    """
    wanted = ", ".join(architectures)
    if why := absent_gpu():
        raise TargetError(
            f"this artifact runs on NVIDIA GPUs ({wanted}), and {why}: install its driver, or compile for a "
            "CPU with --target native"
        )
    _load_library(tvm)
    device = tvm.runtime.device("cuda", 0)
    if not device.exist:
        raise TargetError("TVM finds no GPU although the driver has one; check CUDA_VISIBLE_DEVICES")
    major, minor = (int(part) for part in str(device.compute_version).split("."))
    if not any(runs_on(architecture, major, minor) for architecture in architectures):
        raise TargetError(
            f"compiled for {wanted}, but this GPU ({device.device_name}) is sm_{major}{minor}: "
            f"compile with --target cuda:sm_{major}{minor}"
        )
    return device


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Whether code for `architecture` runs on a GPU of that compute capability.

    PTX (``compute_87``) does on every later one. Machine code does where the major number is equal and the
    minor one is not larger; code for sm_90 uses features of exactly that (sm_90a).
    """
    kind, _, digits = architecture.partition("_")
    number = int(digits)
    if kind == "compute":
        return number <= 10 * major + minor
    return number // 10 == major and (number % 10 == minor if major >= 9 else number % 10 <= minor)


def _load_library(tvm: ModuleType) -> None:
    """Load ``libtvm_runtime_cuda.so``, which TVM's runtime-only import leaves out, after CUDA's runtime."""
    places: list[str | Path] = [RUNTIME]
    spec = importlib.util.find_spec("nvidia")  # where pip puts nvidia-cuda-runtime
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        places += sorted(Path(folder).glob(f"*/lib/{RUNTIME}"))
    places.append(Path("/usr/local/cuda/lib64") / RUNTIME)
    for place in places:
        try:
            ctypes.CDLL(str(place), mode=ctypes.RTLD_GLOBAL)
            break
        except OSError:
            continue
    else:
        raise TargetError(
            f"no {RUNTIME} (CUDA's runtime library): `pip install nvidia-cuda-runtime`, on a Jetson JetPack 7"
        )
    library = Path(str(tvm.__file__)).parent / "lib" / "libtvm_runtime_cuda.so"
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(f"{library} does not load ({error}): reinstall apache-tvm") from error


class Stream:
    """A stream of `device` that TVM's kernels of this thread go to from now on."""

    def __init__(self, device: Any) -> None:
        self._device, self._driver = device, ctypes.CDLL("libcuda.so.1")
        handle = device.create_raw_stream()
        device.set_raw_stream(handle)
        # TVM and the driver mean the same address.
        self._handle = ctypes.c_void_p(getattr(handle, "value", handle))

    def clear(self, tensor: Any, size: int) -> None:
        """Set `size` bytes of a tensor to zero."""
        self._call(
            "cuMemsetD8Async", ctypes.c_void_p(address(tensor)), 0, ctypes.c_size_t(size), self._handle
        )

    def synchronize(self) -> None:
        """Wait for everything on the stream."""
        self._call("cuStreamSynchronize", self._handle)

    def upload(self, tensor: Any, source: Any, size: int) -> None:
        """Copy `size` bytes at the address `source` of the host to a tensor; they may change afterwards."""
        self._call(
            "cuMemcpyHtoDAsync_v2",
            ctypes.c_void_p(address(tensor)),
            source,
            ctypes.c_size_t(size),
            self._handle,
        )

    def download(self, target: Any, tensor: Any, size: int, offset: int = 0) -> None:
        """Copy `size` bytes of a tensor, from `offset` on, to the address `target` of the host, and wait."""
        source = ctypes.c_void_p(address(tensor) + offset)
        self._call("cuMemcpyDtoHAsync_v2", target, source, ctypes.c_size_t(size), self._handle)
        self.synchronize()

    def capture(self, run: Callable[[], Any]) -> tuple[Graph, Any]:
        """The launches of `run` as a graph, and what `run` returned, which has to live as long."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", self._handle, _RELAXED)
        try:
            result = run()
        finally:
            self._call("cuStreamEndCapture", self._handle, ctypes.byref(graph))
        self._call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        nodes = ctypes.c_size_t(0)
        self._call("cuGraphGetNodes", graph, None, ctypes.byref(nodes))
        self._call("cuGraphDestroy", graph)
        return Graph(self, executable, nodes.value), result

    def launch(self, executable: ctypes.c_void_p) -> None:
        """Put a graph on the stream."""
        self._call("cuGraphLaunch", executable, self._handle)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._driver, name)(*arguments)
        if status != 0:
            raise TargetError(f"CUDA driver: {name} failed with error {status}; is the GPU's memory full?")


class Graph:
    """Launches that were captured once, to be repeated with the same addresses."""

    def __init__(self, stream: Stream, executable: ctypes.c_void_p, launches: int) -> None:
        self._stream, self._executable = stream, executable
        self.launches = launches
        """How many kernels it runs."""

    def launch(self) -> None:
        """Run it on the stream, without waiting."""
        self._stream.launch(self._executable)


def address(tensor: Any) -> int:
    """Where a TVM tensor's data is."""
    return int(tensor.data_ptr())
