"""The safetensors files of a checkpoint folder: headers checked against file lengths, tensors read by name.

Files are read with plain reads at the offsets the headers give, never mapped: a large checkpoint then costs
only the memory of the tensors somebody holds.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moqc.errors import ModelError, reason

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # the limit of the safetensors library itself
_CHUNK = 1 << 22


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies: file, dtype as the header writes it, shape, first byte within the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Shards:
    """All tensors of a checkpoint folder, by their names in the files."""

    def __init__(self, folder: Path) -> None:
        """Read the index and every header of `folder`. Raises ModelError."""
        self.folder = folder
        self.files = _weight_files(folder)
        self.tensors: dict[str, Stored] = {}
        for file in self.files:
            for name, stored in _header(file):
                if name in self.tensors:
                    raise ModelError(
                        f"{folder}: {name} is in {self.tensors[name].file.name} and in {file.name}"
                    )
                self.tensors[name] = stored
        _check_index(folder, self.tensors)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a stored tensor. Raises ModelError for one that moqc does not read."""
        stored = self.tensors[name]
        if stored.dtype not in DTYPES:
            raise ModelError(
                f"{stored.file}: {name} is stored as {stored.dtype}; moqc reads {', '.join(DTYPES)} only: "
                "dequantize or convert the checkpoint first"
            )
        return DTYPES[stored.dtype]

    def read(self, name: str, row: int | None = None) -> torch.Tensor:
        """The tensor called `name`, or its slice `row` along the first axis, in its stored dtype.

        Raises ModelError for a dtype moqc does not read, a file that changed, and for numbers that are none.
        """
        tensor = read_stored(name, self.tensors[name], self.dtype(name), row)
        return require_finite(tensor, name, self.tensors[name].file)

    def digest(self, extra: Iterable[Path]) -> str:
        """sha256 (hex) over the names and bytes of `extra` and of all weight files."""
        sha = hashlib.sha256()
        for file in [*extra, *self.files]:
            sha.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK):
                    sha.update(chunk)
        return sha.hexdigest()


def read_stored(name: str, stored: Stored, dtype: torch.dtype, row: int | None) -> torch.Tensor:
    """The bytes of a tensor, or of its slice `row` along the first axis, as `dtype`. Raises ModelError."""
    offset, shape = stored.offset, stored.shape
    if row is not None:
        shape = shape[1:]
        offset += row * math.prod(shape) * dtype.itemsize
    data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8)
    with stored.file.open("rb") as stream:
        stream.seek(offset)
        if stream.readinto(data.numpy().data) != len(data):
            raise ModelError(f"{stored.file}: ends inside {name}: the file changed while it was being read")
    return data.view(dtype).reshape(shape)


def require_finite(tensor: torch.Tensor, name: str, file: Path) -> torch.Tensor:
    """`tensor` itself. Raises ModelError for numbers that are none."""
    if not torch.isfinite(tensor).all():
        raise ModelError(f"{file}: {name} holds NaN or infinity; download it again")
    return tensor


def _weight_files(folder: Path) -> list[Path]:
    """The files of the index, or the only safetensors file."""
    index = folder / _INDEX
    if index.is_file():
        files = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for file in files:
            if not file.is_file():
                raise ModelError(
                    f"{folder}: {file.name} is missing, although {_INDEX} lists it; download it again"
                )
        return files
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise ModelError(f"{folder}: {len(found)} safetensors files but no {_INDEX}; download the index too")
    if not found:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = (
            f"; {pickled[0]} is a pickle, which moqc never loads: convert it to safetensors"
            if pickled
            else ": download them too"
        )
        raise ModelError(f"{folder}: no safetensors files{hint}")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of its file, as the index says. Raises ModelError."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ModelError(f"{index}: has no weight_map; download it again")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise ModelError(f"{index}: {file!r} is not the name of a file in its folder")
    return names


def _check_index(folder: Path, tensors: dict[str, Stored]) -> None:
    """Every tensor of the index is in the file the index names."""
    if not (folder / _INDEX).is_file():
        return
    for name, file in _weight_map(folder / _INDEX).items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(f"{folder}: {_INDEX} says that {name} is in {file}, but it is not")


def _header(file: Path) -> Iterator[tuple[str, Stored]]:
    """Tensors of one file. Raises ModelError when the header or the length of the file is wrong."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise ModelError(f"{file}: truncated or not a safetensors file; download it again")
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: _entry(file, 8 + length, entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(
                f"{file}: truncated or not a safetensors file ({reason}); download it again"
            ) from error
    expected = max((stored.offset + bytes for stored, bytes in entries.values()), default=8 + length)
    if size != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise ModelError(f"{file}: {what} ({size} bytes of {expected}); download it again")
    for name, (stored, bytes) in entries.items():
        dtype = DTYPES.get(stored.dtype)
        if dtype is not None and math.prod(stored.shape) * dtype.itemsize != bytes:
            raise ModelError(f"{file}: {name} has {bytes} bytes, too many or too few for {stored.shape}")
        yield name, stored


def _entry(file: Path, start: int, entry: Any) -> tuple[Stored, int]:
    """A tensor's entry in a header, and its number of bytes; `start` is where the data begin."""
    begin, end = map(int, entry["data_offsets"])
    if not 0 <= begin <= end:
        raise ValueError(f"data_offsets {begin}, {end}")
    return Stored(file, str(entry["dtype"]), tuple(map(int, entry["shape"])), start + begin), end - begin


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from `file`. Raises ModelError when it is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{file}: cannot read ({reason(error)})") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: is not a JSON object")
    return value
