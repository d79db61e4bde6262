"""Compile CUDA code ahead of time, on machines with and without a GPU.

TVM's CUDA code generator lives in ``libtvm_runtime_cuda.so``, which is linked to the driver
(``libcuda.so.1``). Where there is no driver, that library does not load and TVM would embed source text
instead of machine code; `prepare` then builds a stub driver whose every function answers "no device", which
is all that compiling needs.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from moqc.errors import TargetError
from moqc.toolchains import TOOLS

NO_DEVICE = 100
"""CUDA_ERROR_NO_DEVICE."""


def find_nvcc() -> Path:
    """The CUDA compiler: on the PATH, else in the usual place. TargetError if there is none."""
    return TOOLS["nvcc"].require()


def nvcc_version() -> str:
    """Such as 13.0.88, or as much as nvcc says of it. TargetError if there is none."""
    done = subprocess.run([str(find_nvcc()), "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"\bV([\d.]+)", done.stdout)
    return found[1] if found else "unknown"


def compile_fatbin(source: str, architectures: Sequence[str]) -> bytes:
    """Machine code of CUDA C++ `source` for each of `architectures` (``sm_90``...), as one fat binary.

    ``compute_87`` is PTX for that. sm_90 becomes sm_90a, which has the instructions of Hopper's warp groups.
    TargetError with the compiler's first error if it refuses.
    """
    codes = [arch + ("a" if arch == "sm_90" else "") for arch in architectures]
    options = [f"-gencode=arch={code.replace('sm', 'compute')},code={code}" for code in codes]
    with tempfile.TemporaryDirectory(prefix="moqc-nvcc-") as folder:
        text, binary = Path(folder, "kernels.cu"), Path(folder, "kernels.fatbin")
        text.write_text(source)
        command = [str(find_nvcc()), "-std=c++17", "-O3", "--fatbin", *options, "-o", str(binary), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = [line for line in done.stderr.splitlines() if "error" in line]
            raise TargetError(f"nvcc failed: {(lines or [done.stderr.strip()])[0]}")
        return binary.read_bytes()


def with_blocks(source: str) -> str:
    """`source` with the blocks a multiprocessor has, of each kernel whose registers depend on them.

    The compiler wants to be told, and TVM does not. Warp groups that pass on registers (``grouped.py``) have
    a multiprocessor for themselves; the int8 kernels for several tokens have the number in their plan's type
    (``quads.py``).
    """
    first, *rest = re.split(r"__launch_bounds__\((\d+)\)", source)
    pieces = [first]
    for threads, text in zip(rest[::2], rest[1::2], strict=True):
        blocks = ""
        if re.search(r"moqc::(Byte)?Rings<", text):
            blocks = ", 1"
        elif quads := re.search(r"moqc::quads::Plan<[^>]*, (\d+)>", text):
            blocks = f", {quads[1]}"
        pieces += [f"__launch_bounds__({threads}{blocks})", text]
    return "".join(pieces)


def prepare(architectures: Sequence[str]) -> None:
    """Make this process able to build CUDA modules for `architectures` with TVM.

    Loads TVM's CUDA library, over a stub driver if there is no real one, and has TVM compile with
    `compile_fatbin`. The last call in a process decides the architectures.
    """
    import tvm

    library = _tvm_library()
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        _load_stub_driver(library)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)

    def compile_source(source: str) -> bytes:
        return compile_fatbin(with_blocks(source), architectures)

    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def _tvm_library() -> Path:
    spec = importlib.util.find_spec("tvm")
    if spec is None or not spec.submodule_search_locations:
        raise TargetError("TVM is not installed: install apache-tvm")
    return Path(spec.submodule_search_locations[0], "lib", "libtvm_runtime_cuda.so")


def _load_stub_driver(library: Path) -> None:
    """Build and load a ``libcuda.so.1`` with the driver functions that `library` wants.

    The loader then finds it by that name; it stays loaded, so the file may go.
    """
    names = sorted(set(re.findall(rb"\0(cu[A-Z]\w+)(?=[@\0])", library.read_bytes())))
    body = "".join(f"int {name.decode()}(void) {{ return {NO_DEVICE}; }}\n" for name in names)
    with tempfile.TemporaryDirectory(prefix="moqc-libcuda-") as folder:
        source, stub = Path(folder, "stub.c"), Path(folder, "libcuda.so.1")
        source.write_text(body)
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(stub), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TargetError(f"cannot build a stub of the CUDA driver: {done.stderr.strip()}")
        ctypes.CDLL(str(stub), mode=ctypes.RTLD_GLOBAL)
