"""The safetensors format, streamed to and from numpy arrays; bfloat16, which numpy lacks, included.

8 bytes little-endian header length, a JSON header that may end in spaces, then the data
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from moqc.errors import ArtifactError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""safetensors type name -> numpy type that holds its bits."""

LINE_BYTES = 64
"""A cache line: the data of a file starts at a multiple of it, and kernels expect tensors to."""
_NAMES = {dtype: name for name, dtype in DTYPES.items() if name != "BF16"}
_ENTRY_BYTES = 160
"""Room one header entry needs beside its name: type, up to eight extents, two offsets."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as a file stores it: `data` has the bits, `dtype` (a key of `DTYPES`) says what they mean."""

    dtype: str
    data: NDArray[Any]

    @classmethod
    def of(cls, array: NDArray[Any]) -> StoredTensor:
        """The tensor that stores a numpy array as it is."""
        return cls(_NAMES[array.dtype], array)

    def copy_to(self, out: NDArray[Any]) -> None:
        """Write the values into `out` (same shape); bfloat16 and float16 may become float32.

        Raises ArtifactError for a conversion that is not exact, such as float32 to int8.
        """
        if self.dtype == "BF16":
            if out.dtype != np.float32:
                raise ArtifactError(f"a bfloat16 tensor cannot be used as {out.dtype}")
            bits = out.view(np.uint32)
            np.copyto(bits, self.data)
            np.left_shift(bits, 16, out=bits)
        elif np.can_cast(self.data.dtype, out.dtype, casting="safe"):
            np.copyto(out, self.data)
        else:
            raise ArtifactError(f"a {self.data.dtype} tensor cannot be used as {out.dtype}")


def open_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, memory-mapped: nothing is read before it is used.

    The arrays are private copies-on-write: whoever writes into one does not change the file.
    Raises ArtifactError when the header does not fit the file.
    """
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"header of {length} bytes")
            header = json.loads(stream.read(length))
        if not isinstance(header, dict):
            raise ValueError("header is not an object")
        header.pop("__metadata__", None)
        if path.stat().st_size == 8 + length:  # nothing but empty tensors; such a file cannot be mapped
            return {name: _view(np.empty(0, np.uint8), entry) for name, entry in header.items()}
        raw = np.memmap(path, dtype=np.uint8, mode="c", offset=8 + length)
        return {name: _view(raw, entry) for name, entry in header.items()}
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{path}: not a valid safetensors file ({error})") from error


def _view(raw: NDArray[np.uint8], entry: dict[str, Any]) -> StoredTensor:
    start, stop = entry["data_offsets"]
    data = raw[start:stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return StoredTensor(entry["dtype"], data)


@dataclass
class TensorWriter:
    """Writes one file tensor after tensor; only one is in memory at a time.

    The header comes first in the file but is known last: room for it is kept and filled with spaces, which
    the format allows. `names` are all tensors the file may get.
    """

    stream: BinaryIO
    names: Sequence[str]
    _entries: dict[str, Any] = field(default_factory=dict)
    _end: int = 0

    def __post_init__(self) -> None:
        room = sum(len(json.dumps(name)) + _ENTRY_BYTES for name in self.names) + 2
        self._room = -(-(room + 8) // LINE_BYTES) * LINE_BYTES - 8
        self.stream.seek(8 + self._room)

    def add(self, name: str, tensor: StoredTensor) -> int:
        """Append one tensor; returns its bytes."""
        data = np.ascontiguousarray(tensor.data)
        self._entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.data.shape),
            "data_offsets": [self._end, self._end + data.nbytes],
        }
        self.stream.write(data.reshape(-1).view(np.uint8).data)
        self._end += data.nbytes
        return data.nbytes

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the header, unless the block failed."""
        if kind is None:
            self.stream.seek(0)
            self.stream.write(self._room.to_bytes(8, "little"))
            self.stream.write(json.dumps(self._entries, separators=(",", ":")).encode().ljust(self._room))


@contextmanager
def create_tensors(path: Path, names: Sequence[str]) -> Iterator[TensorWriter]:
    """A new file at `path` that gets some of `names`."""
    with path.open("wb") as stream, TensorWriter(stream, names) as writer:
        yield writer
