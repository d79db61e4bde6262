"""The target table: a name -> what TVM compiles for, which schedules serve it, what the host must have."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass, replace
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
    packed weight layout its kernels read (`moqc.quant.layouts`). `activations` are the modes its kernels
    have, the default first; `cache` is the dtype of its key-value caches. `architectures` are those of the
    GPUs that the library has machine code for; empty for CPUs. `roofline` is None where nothing was measured.
    """

    name: str
    tvm: dict[str, Any]
    features: frozenset[str]
    schedules: str = "cpu"
    layout: str = "interleaved16"
    activations: tuple[str, ...] = ("int8", "float")
    cache: str = "float32"
    architectures: tuple[str, ...] = ()
    doc: str = ""
    roofline: Roofline | None = None

    @property
    def device(self) -> str:
        """TVM's name of the device that runs the model: ``cpu`` or ``cuda``."""
        return "cuda" if self.architectures else "cpu"

    def mode(self, activations: str | None) -> str:
        """The mode of activations asked for, or the default. TargetError if there are no kernels for it."""
        if activations not in (None, *self.activations):
            modes = ", ".join(self.activations)
            raise TargetError(f"activations {activations!r}: the kernels of target {self.name} have {modes}")
        return activations or self.activations[0]

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

_XEON = (
    "2 threads of a 2-core AVX-512 Xeon, a virtual machine whose memory gave 7 to 23 GB/s from hour to hour "
    "(give --bandwidth for yours): `moqc bench-kernels --shape qwen3-30b-a3b --bits 4,2 --tokens 1`, and "
    "decoding tiny-moe and small-moe for the time of a layer"
)


def _xeon(weight_rate: float) -> Roofline:
    """The machine moqc was written on, with the rate of a target's kernels at 2 bits, weights in cache."""
    return Roofline(bandwidth=1.7e10, weight_rate=weight_rate, layer_seconds=1.3e-4, source=_XEON)


_H200 = Roofline(
    bandwidth=3.7e12,
    weight_rate=1.0e13,
    layer_seconds=5.6e-6,
    source="NVIDIA H200, experts of mixtral-8x7b at 1 token and two launches a layer, in "
    "docs/benchmarks-h200.md; what else a layer does is not counted: an upper bound",
)

TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            "x86-64-v3",
            {"kind": "llvm", "mcpu": "x86-64-v3"},
            _V3,
            doc="any x86 with AVX2 (2013 on)",
            roofline=_xeon(6.0e10),
        ),
        Target(
            "x86-64-v4",
            {"kind": "llvm", "mcpu": "x86-64-v4"},
            _V4,
            doc="x86 with AVX-512 (Skylake-X on)",
            roofline=_xeon(4.9e10),
        ),
        Target(
            "x86-64-v4-vnni",
            {"kind": "llvm", "mcpu": "cascadelake"},
            _V4 | {"avx512_vnni"},
            doc="x86 with AVX-512 and VNNI (Cascade Lake on)",
            roofline=_xeon(4.8e10),
        ),
        Target(
            "x86-64-v4-gfni",
            {"kind": "llvm", "mcpu": "cascadelake", "mattr": ["+gfni"]},
            _V4 | {"avx512_vnni", "gfni"},
            doc="x86 with AVX-512, VNNI and GFNI (Ice Lake, Zen 4 on)",
            roofline=_xeon(1.0e11),
        ),
    )
}

CUDA_ARCHITECTURES = {"sm_80": 163, "sm_86": 99, "sm_87": 163, "sm_89": 99, "sm_90": 227}
"""NVIDIA architectures that there are kernels for, and the KiB of shared memory a block may have there."""
CUDA_DEFAULT = "cuda:sm_90@x86-64-v3"
"""What ``cuda`` stands for."""


def _cuda(name: str) -> Target:
    """The target of ``cuda[:ARCHITECTURE[+ARCHITECTURE...]][@HOST]``; the default has what is left out."""
    form = re.fullmatch(r"cuda(?::(?P<archs>[\w+]+))?(?:@(?P<host>[\w-]+))?", name)
    defaults = re.fullmatch(r"cuda:(?P<archs>[\w+]+)@(?P<host>[\w-]+)", CUDA_DEFAULT)
    if form is None or defaults is None:
        raise TargetError(f"target {name!r}: expected for example {CUDA_DEFAULT} or cuda:sm_80+sm_90")
    architectures = tuple(sorted(set((form["archs"] or defaults["archs"]).split("+"))))
    for architecture in architectures:
        if architecture not in CUDA_ARCHITECTURES:
            known = ", ".join(CUDA_ARCHITECTURES)
            raise TargetError(f"target {name!r}: unknown architecture {architecture!r}: known are {known}")
    host = TARGETS.get(form["host"] or defaults["host"])
    if host is None or host.architectures:
        cpus = ", ".join(key for key, each in TARGETS.items() if not each.architectures)
        raise TargetError(f"target {name!r}: unknown host {form['host']!r}: known are {cpus}")
    shared = min(CUDA_ARCHITECTURES[architecture] for architecture in architectures) * 1024
    tvm = {"kind": "cuda", "arch": architectures[0], "max_threads_per_block": 1024, "host": host.tvm}
    return Target(
        f"cuda:{'+'.join(architectures)}@{host.name}",
        {**tvm, "max_shared_memory_per_block": shared},
        host.features,
        schedules="cuda",
        layout="mma16x256",
        activations=("float",),
        cache="float16",
        architectures=architectures,
        roofline=_H200 if architectures == ("sm_90",) else None,
        doc="NVIDIA GPUs; cuda:ARCHITECTURE+...@HOST chooses, by default " + CUDA_DEFAULT,
    )


TARGETS["cuda"] = replace(_cuda("cuda"), name="cuda")


def host_features() -> frozenset[str]:
    """CPU flags of this machine, by their Linux names."""
    if platform.machine() != "x86_64":
        return frozenset()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def find_target(name: str) -> Target:
    """The target called `name`; ``native`` is the most capable CPU entry this machine supports.

    ``cuda`` may name architectures and host, as in ``cuda:sm_80+sm_90@x86-64-v4``.

    Raises TargetError with the known names.
    """
    if name == "native":
        flags = host_features()
        cpus = [target for target in TARGETS.values() if not target.architectures]
        fitting = [target for target in cpus if target.features <= flags]
        if not fitting:
            raise TargetError("native: this machine has no AVX2; moqc has no kernels for it")
        return max(fitting, key=lambda target: len(target.features))
    if name.startswith(("cuda:", "cuda@")):
        return _cuda(name)
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}: known are native, {', '.join(TARGETS)}")
    return TARGETS[name]
