"""Open what an artifact's folder computes with: TVM's virtual machine, or a list of launches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moqc.errors import ArtifactError, TargetError
from moqc.launches import FILE, read_launches
from moqc.manifest import LIBRARY, Manifest
from moqc.runtime.device import Device, open_device
from moqc.runtime.opencl import LaunchedFunction, OpenCl
from moqc.runtime.tvm_runtime import import_runtime
from moqc.tensorfile import StoredTensor, open_tensors


@dataclass(frozen=True)
class Engine:
    """The compiled function ``main(ids, positions, weights, caches)`` with its weights on its device.

    `last` is the same with logits of the last token alone, and `advance` the greedy step, where the library
    has them; `owner` is what must live as long as the functions.
    """

    device: Device
    main: Callable[..., Any]
    weights: Any
    advance: Callable[..., Any] | None = None
    last: Callable[..., Any] | None = None
    owner: Any = None


def open_engine(path: Path, manifest: Manifest) -> Engine:
    """Load the code and the weights of a checked folder. Raises TargetError where nothing here runs it."""
    if FILE in manifest.files:
        return _open_launches(path, manifest)
    tvm = import_runtime()
    device = open_device(tvm, manifest.target.architectures)
    library = tvm.runtime.load_module(str((path / LIBRARY).resolve()))
    # The machine owns the memory pools of `main`: it must live as long as the function.
    machine = tvm.runtime.vm.VirtualMachine(library, device.handle)
    advance = machine["advance"] if manifest.target.architectures else None
    weights = load_weights(device, path, manifest)
    return Engine(device, machine["main"], weights, advance, _last(machine), machine)


def _last(machine: Any) -> Callable[..., Any] | None:
    try:
        found: Callable[..., Any] = machine["last"]
    except AttributeError:  # `moqc.passes.last_logits` says when
        return None
    return found


def _open_launches(path: Path, manifest: Manifest) -> Engine:
    launches = read_launches(path)
    if launches.language != "opencl":
        raise TargetError(
            f"{path}: is a page for browsers: `python -m http.server -d {path}` and open http://localhost:8000"
        )
    device = OpenCl()
    main = LaunchedFunction(device, launches, launches.main)
    sources = stored_tensors(path, manifest)
    types = {parameter.name: parameter.dtype for parameter in manifest.parameters}
    weights = {name: device.stored(source, types[name]) for name, source in sources.items()}
    return Engine(device, main, weights)


def load_weights(device: Device, folder: Path, manifest: Manifest) -> Any:
    """The weights tuple of ``main``: TVM tensors in the function's order and types, 64-byte aligned."""
    sources, types = stored_tensors(folder, manifest), manifest.parameters
    return device.group([device.stored(sources[each.name], each.dtype) for each in types])


def stored_tensors(folder: Path, manifest: Manifest) -> dict[str, StoredTensor]:
    """The stored form of every parameter. Raises ArtifactError where one is missing or of another shape."""
    stored: dict[str, StoredTensor] = {}
    for name in manifest.files:
        if name.endswith(".safetensors"):
            stored |= open_tensors(folder / name)
    for parameter in manifest.parameters:
        if parameter.name not in stored:
            raise ArtifactError(
                f"{folder}: no tensor {parameter.name!r} in its files; compile the model again"
            )
        shape = stored[parameter.name].data.shape
        if shape != parameter.shape:
            raise ArtifactError(
                f"{folder}: {parameter.name} is {shape}, not {parameter.shape}; compile again"
            )
    return stored
