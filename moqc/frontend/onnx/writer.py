"""Write an ONNX model whose weights are in a file beside it, one weight in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import external_data_helper, helper

MODEL, DATA = "model.onnx", "model.onnx.data"
_ALIGNMENT = 4096  # so that a reader can map each weight


class DataWriter:
    """Appends weights to the data file and to the graph's initializers."""

    def __init__(self, graph: onnx.GraphProto, stream: BinaryIO) -> None:
        """`stream` is the open data file."""
        self._graph, self._stream = graph, stream

    def add(self, name: str, array: NDArray[Any]) -> str:
        """Append `array` as the initializer `name`, which is returned."""
        plain = np.ascontiguousarray(array)
        self._stream.write(bytes(-self._stream.tell() % _ALIGNMENT))
        tensor = onnx.TensorProto(
            name=name, data_type=helper.np_dtype_to_tensor_dtype(plain.dtype), dims=plain.shape
        )
        tensor.raw_data = b""
        external_data_helper.set_external_data(tensor, DATA, self._stream.tell(), plain.nbytes)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        self._stream.write(plain.reshape(-1).view(np.uint8).data)
        self._graph.initializer.append(tensor)
        return name


def save(model: onnx.ModelProto, folder: Path) -> None:
    """Write the model file; its data file is there already. Checks both with onnx.checker."""
    path = folder / MODEL
    path.write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(path))
