"""Where intermediate results live: a content-addressed cache, and the parameters of one compilation.

A file appears under its final name only when it is complete: it is written beside its place under a name
nothing looks for, flushed, and moved there with `os.replace`. An interrupted run therefore leaves at most a
stray ``.tmp-*`` file, never a half-written entry. Two processes may share a folder: whoever moves last
wins, and both wrote the same content because the key names it.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError, reason

if TYPE_CHECKING:
    import torch

Part: TypeAlias = "bytes | str | float | NDArray[Any] | Sequence[Part] | Mapping[str, Part] | None"

_TEMPORARY = ".tmp-"


def default_root() -> Path:
    """``$XDG_CACHE_HOME/moqc``, or ``~/.cache/moqc``. The only place that asks the environment for it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say to ignore a relative path.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "moqc"


def digest(*parts: Part) -> str:
    """Hex digest (32 characters) of `parts`, for use as a key.

    Every part goes in with its type and length, so ``digest("ab", "c")`` and ``digest("a", "bc")`` differ, as
    do ``1``, ``True``, ``1.0`` and ``"1"``. Dict keys are sorted; arrays count dtype, shape and content.
    """
    state = hashlib.sha256()
    for part in parts:
        _feed(state, part)
    return state.hexdigest()[:32]


def _feed(state: Any, part: Part) -> None:
    if isinstance(part, Mapping):
        state.update(f"dict:{len(part)};".encode())
        for key in sorted(part):
            _feed(state, key)
            _feed(state, part[key])
    elif isinstance(part, (list, tuple)):
        state.update(f"list:{len(part)};".encode())
        for item in part:
            _feed(state, item)
    else:
        kind, content = _leaf(part)
        state.update(f"{kind}:{len(content)};".encode())
        state.update(content)


def _leaf(part: object) -> tuple[str, bytes]:
    if isinstance(part, np.ndarray):
        if part.dtype.hasobject:
            raise TypeError("digest() takes no arrays of objects: their bytes are addresses")
        return f"array:{part.dtype.str}:{part.shape}", part.tobytes()
    if isinstance(part, bytes):
        return "bytes", part
    if part is None or isinstance(part, (str, int, float)):
        return type(part).__name__, str(part).encode() if isinstance(part, str) else repr(part).encode()
    raise TypeError(f"digest() takes plain values, not {type(part).__name__}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`; moved to `path` if the body succeeds, else removed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix=path.suffix, dir=path.parent)
    except OSError as error:
        raise UserError(f"{path.parent}: cannot write ({error.strerror}); give another --cache") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot write ({reason(error)}); check space and rights") from error
    finally:
        temporary.unlink(missing_ok=True)


class Workspace:
    """A cache folder: digest -> tensors (safetensors) or plain data (JSON).

    Keys come from `digest` and must name everything the content depends on.
    """

    def __init__(self, root: Path | str | None = None) -> None:
        """Use `root` (created when first written to), by default `default_root()`."""
        self.root = Path(root) if root is not None else default_root()

    def _path(self, key: str, suffix: str) -> Path:
        if not key or set(key) - set("0123456789abcdef"):
            raise ValueError(f"{key!r} is not a key: keys are made by digest()")
        return self.root / key[:2] / (key + suffix)

    def has(self, key: str) -> bool:
        """Whether a complete entry, tensors or JSON, is stored under `key`."""
        return self._path(key, ".safetensors").is_file() or self._path(key, ".json").is_file()

    def save_tensors(self, key: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Store named tensors; views are made contiguous. Raises UserError where it cannot write."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = self._path(key, ".safetensors")
        # Tensors that share memory are refused by safetensors; a copy is what the file holds anyway.
        owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        with atomic(path) as temporary:
            try:
                save_file(owned, temporary)
            except SafetensorError as error:  # how the library reports a full disk
                raise UserError(f"{path}: cannot write ({reason(error)}); check space and rights") from error

    def load_tensors(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors stored under `key`, on the CPU. Raises KeyError if there are none."""
        from safetensors.torch import load_file

        path = self._path(key, ".safetensors")
        if not path.is_file():
            raise KeyError(key)
        return load_file(path)

    def save_json(self, key: str, value: Any) -> None:
        """Store plain data (dict, list, str, int, float, bool, None)."""
        text = json.dumps(value, allow_nan=False, separators=(",", ":"))
        with atomic(self._path(key, ".json")) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def load_json(self, key: str) -> Any:
        """The data stored under `key`. Raises KeyError if there is none."""
        path = self._path(key, ".json")
        if not path.is_file():
            raise KeyError(key)
        return json.loads(path.read_text(encoding="utf-8"))

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"


class ParamStore:
    """A folder of named numpy arrays, one ``.npy`` a name; reading maps the file instead of loading it."""

    def __init__(self, folder: Path | str) -> None:
        """Use `folder`, created when first written to; arrays already there are kept."""
        self.folder = Path(folder)

    def _path(self, name: str) -> Path:
        if not name:
            raise ValueError("a parameter needs a name")
        escaped = quote(name, safe="")
        if escaped.startswith("."):  # a leading dot marks our temporary files
            escaped = "%2E" + escaped[1:]
        return self.folder / f"{escaped}.npy"

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Store `array` under `name`, replacing what was there. Raises UserError where it cannot write."""
        with atomic(self._path(name)) as temporary, temporary.open("wb") as file:
            np.save(file, np.ascontiguousarray(array).reshape(array.shape), allow_pickle=False)

    def get(self, name: str) -> NDArray[Any]:
        """The array called `name`, read-only and memory-mapped. Raises KeyError if there is none.

        Every array kept holds a file descriptor: use them one after the other.
        """
        path = self._path(name)
        if not path.is_file():
            raise KeyError(name)
        return cast("NDArray[Any]", np.load(path, mmap_mode="r", allow_pickle=False))

    def names(self) -> list[str]:
        """Names of all arrays, sorted."""
        if not self.folder.is_dir():
            return []
        found = (path for path in self.folder.glob("*.npy") if not path.name.startswith(_TEMPORARY))
        return sorted(unquote(path.stem) for path in found)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and bool(name) and self._path(name).is_file()

    def __repr__(self) -> str:
        return f"ParamStore({str(self.folder)!r})"
