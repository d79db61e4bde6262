"""Read an ONNX file: checked before anything is computed, weights left on disk until they are asked for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import checker, external_data_helper, helper, inliner, numpy_helper

from moqc.errors import ModelError

OLDEST_IR, OLDEST_OPSET = 3, 11
MICROSOFT = "com.microsoft"
MOQC = "ai.moqc"
DOMAINS = ("", "ai.onnx", MICROSOFT, MOQC)
_PACKED = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)  # two elements a byte
_SHOWN = 3


@dataclass(frozen=True)
class OnnxModel:
    """A checked model. `graph` is its only function; weights are read by name with `array`."""

    path: Path
    graph: onnx.GraphProto
    opset: int
    weights: dict[str, onnx.TensorProto]
    fingerprint: str

    def array(self, name: str) -> NDArray[np.generic]:
        """The weight called `name`. Raises ModelError where there is none."""
        if name not in self.weights:
            raise ModelError(
                f"{self.path}: {name} is computed, not stored; it cannot be compiled as a weight"
            )
        return numpy_helper.to_array(self.weights[name], base_dir=str(self.path.parent))


def read_onnx(path: Path) -> OnnxModel:
    """Open an ONNX file.

    Raises ModelError, in one line, for a file that is no ONNX model, an IR or operator-set version or a
    domain that moqc does not know, external data that is missing, short or outside of the folder, weights
    whose bytes do not fit their shapes, and whatever onnx's own checker refuses (cycles, missing inputs...).
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise ModelError(f"{path}: is not an ONNX model ({error})") from error
    except OSError as error:
        raise ModelError(f"{path}: cannot read ({error.strerror})") from error
    opset = _check_versions(path, model)
    for tensor in model.graph.initializer:
        _check_tensor(path, tensor)
    try:
        checker.check_model(str(path))
    except (checker.ValidationError, ValueError, RuntimeError) as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ModelError(f"{path}: onnx.checker refuses it: {text.strip()}") from error
    inlined = inliner.inline_local_functions(model)
    _check_domains(path, inlined.graph)
    weights = {tensor.name: tensor for tensor in inlined.graph.initializer}
    return OnnxModel(path, inlined.graph, opset, weights, _fingerprint(path, inlined.graph))


def _check_versions(path: Path, model: onnx.ModelProto) -> int:
    """The version of the default operator set."""
    if not model.HasField("graph") or not model.graph.node:
        raise ModelError(f"{path}: is not an ONNX model, or an empty one: it has no nodes")
    if not OLDEST_IR <= model.ir_version <= onnx.IR_VERSION:
        raise ModelError(
            f"{path}: IR version {model.ir_version}; the installed onnx {onnx.__version__} and moqc know "
            f"{OLDEST_IR} to {onnx.IR_VERSION}"
        )
    newest = onnx.defs.onnx_opset_version()
    opset = max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
    if not OLDEST_OPSET <= opset <= newest:
        raise ModelError(f"{path}: operator set {opset}; moqc reads {OLDEST_OPSET} to {newest}")
    return opset


def _check_domains(path: Path, graph: onnx.GraphProto) -> None:
    unknown = sorted({f"{n.domain}::{n.op_type}" for n in graph.node if n.domain not in DOMAINS})
    if unknown:
        raise ModelError(
            f"{path}: operators of unknown domains: {', '.join(unknown[:_SHOWN])}; known are onnx's own and "
            f"those of {MICROSOFT} and {MOQC}"
        )


def _check_tensor(path: Path, tensor: onnx.TensorProto) -> None:
    """Raise ModelError when the bytes of a weight are not there, or not as many as its shape says."""
    if any(extent < 0 for extent in tensor.dims):
        raise ModelError(f"{path}: {tensor.name} has the shape {list(tensor.dims)}")
    count = math.prod(tensor.dims)
    per_byte = 2 if tensor.data_type in _PACKED else 1
    try:
        size = -(-count * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize // per_byte)
    except (KeyError, TypeError) as error:
        raise ModelError(f"{path}: {tensor.name} has an unknown data type {tensor.data_type}") from error
    if external_data_helper.uses_external_data(tensor):
        stored = _external_bytes(path, tensor, size)
    elif tensor.HasField("raw_data"):
        stored = len(tensor.raw_data)
    else:
        return  # typed fields: counted by onnx.checker
    if stored != size:
        raise ModelError(f"{path}: {tensor.name} has {stored} bytes, its shape {list(tensor.dims)} {size}")


def _external_bytes(path: Path, tensor: onnx.TensorProto, size: int) -> int:
    """Length of a weight in its file, which must be in the folder of the model, and long enough."""
    info = external_data_helper.ExternalDataInfo(tensor)
    file = path.parent / str(info.location)
    inside = path.parent.resolve() in file.resolve().parents
    if not inside or not file.is_file():
        what = "is missing" if inside else "is not inside of the model's folder"
        raise ModelError(f"{path}: {tensor.name} is in {info.location}, which {what}")
    length = size if info.length is None else int(info.length)
    if int(info.offset or 0) + length > file.stat().st_size:
        raise ModelError(f"{file}: truncated: {tensor.name} ends behind it; copy it again")
    return length


def _fingerprint(path: Path, graph: onnx.GraphProto) -> str:
    """sha256 over the model and its external files."""
    files = {
        external_data_helper.ExternalDataInfo(tensor).location
        for tensor in graph.initializer
        if external_data_helper.uses_external_data(tensor)
    }
    digest = hashlib.sha256()
    for file in (path, *(path.parent / name for name in sorted(files))):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
