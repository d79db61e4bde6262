"""The one place where the runtime imports TVM."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from moqc.errors import UserError

_ABSENT = object()


@contextmanager
def _without_torch() -> Iterator[None]:
    """Hide torch from imports in the block: tvm_ffi loads it wherever it is installed (1.2 s, 300 MB)."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # makes `import torch` raise ImportError
    try:
        yield
    finally:
        if sys.modules.get("torch", _ABSENT) is None:
            del sys.modules["torch"]


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0))


def use_threads(count: int | None) -> int:
    """Have TVM's pool use `count` threads, or for None what the user set or else all cores; the number.

    Takes effect before the pool starts, with the first parallel kernel. Raises UserError below 1.
    """
    if count is not None and count < 1:
        raise UserError(f"threads {count}: must be at least 1")
    if count is not None:
        os.environ["TVM_NUM_THREADS"] = str(count)
    return int(os.environ.setdefault("TVM_NUM_THREADS", str(available_cores())))


def import_runtime() -> ModuleType:
    """Import `tvm` as a runtime: without its compiler library and without torch.

    A process that already imported the compiler (`moqc.compile`, then `moqc.load`) keeps it: the compiler
    contains the runtime. Two of TVM's switches are environment variables read at its import and at the first
    parallel call, so they are set here, unless the user set them:

    * ``TVM_USE_RUNTIME_LIB=1`` loads libtvm_runtime only;
    * ``TVM_NUM_THREADS``: TVM's default is half of the machine's threads, whatever the process may use.
    """
    use_threads(None)
    if "tvm" in sys.modules:
        return sys.modules["tvm"]
    os.environ.setdefault("TVM_USE_RUNTIME_LIB", "1")
    with _without_torch():
        import tvm
        import tvm.runtime.vm
    return tvm  # type: ignore[no-any-return]
