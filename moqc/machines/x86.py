"""x86 CPUs."""

from __future__ import annotations

from moqc.machines.target import Roofline, Target

_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

_XEON = (
    "2 threads of a 2-core AVX-512 Xeon, a virtual machine whose memory gave 7 to 23 GB/s from hour to hour, "
    "17 in the middle, of which kernels reached three quarters (give --bandwidth for yours): "
    "`moqc bench-kernels --shape qwen3-30b-a3b --bits 4,2 --tokens 1`, and decoding tiny-moe and small-moe "
    "for the time of a layer"
)

_VERIFIED = "run in every test, against the reference"
_WIDE = (785_000, 1_630_000)
"""Bytes of libraries whose dot products take pairs of 16-bit numbers, for want of VNNI."""


def _xeon(weight_rate: float) -> Roofline:
    """The machine moqc was written on, with the rate of a target's kernels at 2 bits, weights in cache."""
    return Roofline(bandwidth=1.3e10, weight_rate=weight_rate, layer_seconds=1.3e-4, source=_XEON)


X86 = (
    Target(
        "x86-64-v3",
        {"kind": "llvm", "mcpu": "x86-64-v3"},
        _V3,
        doc="any x86 with AVX2 (2013 on)",
        verified=_VERIFIED,
        roofline=_xeon(6.0e10),
        library_bytes=_WIDE,
    ),
    Target(
        "x86-64-v4",
        {"kind": "llvm", "mcpu": "x86-64-v4"},
        _V4,
        doc="x86 with AVX-512 (Skylake-X on)",
        verified=_VERIFIED,
        roofline=_xeon(4.9e10),
        library_bytes=_WIDE,
    ),
    Target(
        "x86-64-v4-vnni",
        {"kind": "llvm", "mcpu": "cascadelake"},
        _V4 | {"avx512_vnni"},
        doc="x86 with AVX-512 and VNNI (Cascade Lake on)",
        verified=_VERIFIED,
        roofline=_xeon(4.8e10),
    ),
    Target(
        "x86-64-v4-gfni",
        {"kind": "llvm", "mcpu": "cascadelake", "mattr": ["+gfni"]},
        _V4 | {"avx512_vnni", "gfni"},
        doc="x86 with AVX-512, VNNI and GFNI (Ice Lake, Zen 4 on)",
        verified=_VERIFIED,
        roofline=_xeon(1.0e11),
    ),
    Target(
        "x86-64-v4-amx",
        {"kind": "llvm", "mcpu": "cascadelake", "mattr": ["+gfni", "+amx-tile", "+amx-int8"]},
        _V4 | {"avx512_vnni", "gfni", "amx_tile", "amx_int8"},
        doc="x86 with AVX-512, VNNI, GFNI and AMX (Sapphire Rapids on)",
        verified=_VERIFIED,
        roofline=_xeon(1.0e11),
    ),
)
