from __future__ import annotations

import shutil
import struct
from dataclasses import replace

import pytest

from moqc import toolchains
from moqc.errors import TargetError
from moqc.schedules.cuda import toolchain
from moqc.targets import find_target

PTX = 1
"""Kind of an entry of a fat binary; machine code is 2."""
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


@needs_nvcc
def test_compiles_for_several_architectures():
    binary = toolchain.compile_fatbin("__global__ void f(int* p) { *p = 1; }", ["sm_80", "sm_90"])
    assert b"sm_80" in binary
    assert b"sm_90" in binary


@needs_nvcc
def test_compiles_to_ptx():
    binary = toolchain.compile_fatbin("__global__ void f(int* p) { *p = 1; }", ["compute_87"])
    kind, architecture = struct.unpack_from("<H26xH", binary, 16)  # of the first entry of a fat binary
    assert (kind, architecture) == (PTX, 87)
    assert b"\x7fELF" not in binary  # no machine code


@needs_nvcc
def test_a_refusal_is_one_line():
    with pytest.raises(TargetError, match=r"nvcc failed: .*undefined") as caught:
        toolchain.compile_fatbin("__global__ void f(int* p) { *p = unknown; }", ["sm_90"])
    assert "\n" not in str(caught.value)


def test_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setitem(toolchains.TOOLS, "nvcc", replace(toolchains.TOOLS["nvcc"], folders=(tmp_path,)))
    with pytest.raises(TargetError, match="install the CUDA toolkit"):
        toolchains.check_toolchain(find_target("cuda"))
