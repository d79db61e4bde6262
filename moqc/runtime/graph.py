"""Run a compiled graph: a function of named arrays, without tokens and without a state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moqc.errors import ArtifactError, UserError
from moqc.manifest import LIBRARY, GraphSpec, Manifest, read_manifest
from moqc.runtime.artifact import check_files, check_machine
from moqc.runtime.device import open_device
from moqc.runtime.engine import load_weights
from moqc.runtime.tvm_runtime import import_runtime


class Graph:
    """A compiled ONNX graph in memory. Made by `load_graph`; `manifest` says what it is."""

    def __init__(self, path: Path, manifest: Manifest, spec: GraphSpec, tvm: ModuleType) -> None:
        """Load the library and the weights of a checked folder; use `load_graph` instead."""
        self.path, self.manifest, self._spec = path, manifest, spec
        self._device = open_device(tvm, manifest.target.architectures)
        library = tvm.runtime.load_module(str((path / LIBRARY).resolve()))
        self._machine = tvm.runtime.vm.VirtualMachine(library, self._device.handle)
        self._weights = load_weights(self._device, path, manifest)

    def run(self, inputs: Mapping[str, ArrayLike]) -> dict[str, NDArray[Any]]:
        """Outputs by name, for `inputs` by name. Raises UserError for a wrong name, type or shape."""
        arrays = self._check(inputs)
        tensors = [self._device.put(array) for array in arrays]
        result = self._machine["main"](*tensors, self._weights, self._device.group([]))
        found = [result] if hasattr(result, "numpy") else list(result)
        return dict(zip(self._spec.outputs, (tensor.numpy() for tensor in found), strict=True))

    def _check(self, inputs: Mapping[str, ArrayLike]) -> list[NDArray[Any]]:
        """The arrays in order. Symbolic sizes must agree wherever they appear."""
        known = [entry.name for entry in self._spec.inputs]
        if set(inputs) != set(known):
            raise UserError(f"the graph's inputs are {', '.join(known)}; given are {', '.join(inputs)}")
        sizes: dict[str, int] = {}
        arrays = []
        for entry in self._spec.inputs:
            array = np.asarray(inputs[entry.name])
            fits = str(array.dtype) == entry.dtype and array.ndim == len(entry.shape) and array.size > 0
            for extent, size in zip(entry.shape, array.shape, strict=False):
                fits &= size == (int(extent) if extent.isdecimal() else sizes.setdefault(extent, size))
            if not fits:
                raise UserError(
                    f"{entry.name} is {array.dtype} {list(array.shape)}; the graph takes {entry.dtype} "
                    f"[{', '.join(entry.shape)}]"
                )
            arrays.append(array)
        return arrays


def load_graph(path: str | Path, *, verify: bool = False) -> Graph:
    """Load the artifact folder of a compiled graph; checks as `moqc.load`.

    Raises ArtifactError or TargetError; their messages say what to do.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest.graph is None:
        raise ArtifactError(f"{folder}: is a language model; use moqc.load")
    check_machine(folder, manifest)
    check_files(folder, manifest, everything=verify)
    return Graph(folder, manifest, manifest.graph, import_runtime())
