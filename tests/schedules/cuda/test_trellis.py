"""The values of trellis formats as the device code makes them, one lane after the other on the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from random_codes import random_codes

import moqc.schedules.cuda
from moqc.quant.formats import TRELLIS_VALUES, Format
from moqc.quant.pack_mma import field_bits, pack_units
from moqc.quant.tensor import Quantized

COMPILER = shutil.which("c++")
HOST = """
#define __device__
#define __host__
#define __forceinline__ inline
struct { unsigned x; } threadIdx;
static const unsigned* warp;   // the first plane of each lane
static unsigned __shfl_sync(unsigned, unsigned, int lane) { return warp[lane % 32]; }
static unsigned __byte_perm(unsigned a, unsigned, unsigned places) {
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= (a >> 8 * (places >> 4 * i & 3) & 255) << 8 * i;
  return result;
}
static unsigned lop3(unsigned a, unsigned b, unsigned c, int table) {
  unsigned result = 0;
  for (int i = 0; i < 32; ++i) {
    const int at = (a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1);
    result |= unsigned(table >> at & 1) << i;
  }
  return result;
}
"""
LANES = """
template <int BITS> void lanes(const unsigned* planes, unsigned* fields) {   // [32][BITS], [32][1 << BITS]
  unsigned first[32];
  for (int lane = 0; lane < 32; ++lane) first[lane] = planes[lane * BITS];
  warp = first;
  for (threadIdx.x = 0; threadIdx.x < 32; ++threadIdx.x)
    moqc::trellis_fields<BITS>(
        (unsigned(&)[1 << BITS])fields[threadIdx.x << BITS], planes + threadIdx.x * BITS);
}
extern "C" void lanes1(const unsigned* p, unsigned* f) { lanes<1>(p, f); }
extern "C" void lanes2(const unsigned* p, unsigned* f) { lanes<2>(p, f); }
extern "C" void lanes3(const unsigned* p, unsigned* f) { lanes<3>(p, f); }
"""
LOP3 = 'asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(result) : "r"(a), "r"(b), "r"(c), "n"(TABLE));'


@pytest.fixture(scope="module")
def device_code(tmp_path_factory) -> ctypes.CDLL:
    source = Path(moqc.schedules.cuda.__path__[0], "trellis.cu").read_text()
    assert LOP3 in source
    folder = tmp_path_factory.mktemp("trellis")
    text, library = folder / "lanes.cpp", folder / "lanes.so"
    text.write_text(HOST + source.replace(LOP3, "result = lop3(a, b, c, TABLE);") + LANES)
    command = [COMPILER, "-std=c++17", "-shared", "-fPIC", "-o", str(library), str(text)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(library))


def words(codes: np.ndarray, width: int) -> np.ndarray:
    """``[4 quarters, 32 lanes, width]`` of a packed unit."""
    lanes = codes.view(np.uint32).reshape(width, 32, 4).swapaxes(0, 1).reshape(32, 4, width)
    return np.ascontiguousarray(lanes.swapaxes(0, 1))


@pytest.mark.skipif(COMPILER is None, reason="compiles C++")
@pytest.mark.parametrize("bits", TRELLIS_VALUES)
def test_fields_are_those_of_an_integer_format(device_code, bits):
    """Made of the planes of a trellis: the codes of a matrix of its values in an integer format as wide."""
    fmt = Format.tcq(bits, 128)
    codes = random_codes(fmt, (16, 256), torch.Generator().manual_seed(bits))
    ones = torch.ones(16, 2).half()
    planes = words(pack_units(Quantized(fmt, codes, ones, None)).codes, bits)
    width = field_bits(fmt)
    values = torch.tensor(fmt.values, dtype=torch.uint8)[codes.long()]
    expected = words(pack_units(Quantized(Format(width, 128, True), values, ones, None)).codes, width)
    made = np.zeros_like(expected)
    for given, quarter in zip(planes, made, strict=True):
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (given, quarter))
        device_code[f"lanes{bits}"](*pointers)
    assert np.array_equal(made, expected)
