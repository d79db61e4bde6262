"""The target table: a name -> what TVM compiles for, which schedules serve it, what the host must have."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moqc.errors import TargetError


@dataclass(frozen=True, slots=True)
class Roofline:
    """What a machine sustains while one sequence is decoded; `moqc plan` predicts with it.

    `bandwidth`: bytes a second from memory. `weight_rate`: weights a second that are unpacked and multiplied,
    whatever their width. `layer_seconds`: time of a decoder layer that does not depend on its weights (norms,
    attention, router, launches). `source`: the machine and where the numbers are from.
    """

    bandwidth: float
    weight_rate: float
    layer_seconds: float
    source: str


@dataclass(frozen=True, slots=True)
class Target:
    """One machine family.

    `tvm` is the dict `tvm.target.Target` takes. `features` are the CPU flags (Linux names) the generated code
    uses; loading an artifact checks them. `schedules` names the folder under `schedules/`; `layout` the
    packed weight layout its kernels read (`moqc.quant.pack`). `roofline` is None where nothing was measured.
    """

    name: str
    tvm: dict[str, Any]
    features: frozenset[str]
    schedules: str = "cpu"
    layout: str = "interleaved16"
    doc: str = ""
    roofline: Roofline | None = None

    @property
    def vector_lanes(self) -> int:
        """float32 lanes of the widest vector register."""
        return 16 if "avx512f" in self.features else 8

    @property
    def dot(self) -> str:
        """Instruction family for u8 x i8 dot products: a name of `moqc.schedules.cpu.dot.FAMILIES`."""
        if {"avx512_vnni", "avx512bw"} <= self.features:
            return "vnni512-gfni" if "gfni" in self.features else "vnni512"
        return "bw512" if "avx512bw" in self.features else "avx2"


_V3 = frozenset({"avx2", "fma", "f16c", "bmi2"})
_V4 = _V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("x86-64-v3", {"kind": "llvm", "mcpu": "x86-64-v3"}, _V3, doc="any x86 with AVX2 (2013 on)"),
        Target(
            "x86-64-v4", {"kind": "llvm", "mcpu": "x86-64-v4"}, _V4, doc="x86 with AVX-512 (Skylake-X on)"
        ),
        Target(
            "x86-64-v4-vnni",
            {"kind": "llvm", "mcpu": "cascadelake"},
            _V4 | {"avx512_vnni"},
            doc="x86 with AVX-512 and VNNI (Cascade Lake on)",
        ),
        Target(
            "x86-64-v4-gfni",
            {"kind": "llvm", "mcpu": "cascadelake", "mattr": ["+gfni"]},
            _V4 | {"avx512_vnni", "gfni"},
            doc="x86 with AVX-512, VNNI and GFNI (Ice Lake, Zen 4 on)",
        ),
    )
}


def host_features() -> frozenset[str]:
    """CPU flags of this machine, by their Linux names."""
    if platform.machine() != "x86_64":
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def find_target(name: str) -> Target:
    """The target called `name`; ``native`` is the most capable entry this machine supports.

    Raises TargetError with the known names.
    """
    if name == "native":
        flags = host_features()
        fitting = [target for target in TARGETS.values() if target.features <= flags]
        if not fitting:
            raise TargetError("native: this machine has no AVX2; moqc has no kernels for it")
        return max(fitting, key=lambda target: len(target.features))
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}: known are native, {', '.join(TARGETS)}")
    return TARGETS[name]
