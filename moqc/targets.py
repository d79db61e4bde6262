"""The target table: a name -> what TVM compiles for, which schedules serve it, what the host must have."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import replace
from pathlib import Path

from moqc.errors import TargetError
from moqc.machines.cpus import CPUS, find_cpu
from moqc.machines.cuda import CUDA, find_cuda
from moqc.machines.opencl import OPENCL
from moqc.machines.target import Roofline, Target
from moqc.machines.user import read_target
from moqc.machines.webgpu import WEBGPU

__all__ = ["TARGETS", "Roofline", "Target", "find_target", "host_features"]

TARGETS: dict[str, Target] = {**CPUS, **{target.name: target for target in (*CUDA, *OPENCL, WEBGPU)}}

_HWCAP, _HWCAP2 = 16, 26
_ARM_FLAGS = {
    _HWCAP: {"asimd": 1, "asimdhp": 10, "asimddp": 20, "sve": 22},
    _HWCAP2: {"sve2": 1, "i8mm": 13, "bf16": 14},
}
"""Entry of the auxiliary vector -> flag -> its bit (Linux, ``asm/hwcap.h``)."""


def host_features() -> frozenset[str]:
    """CPU flags of this machine, by their Linux names."""
    if platform.system() != "Linux":
        return frozenset()
    if platform.machine() == "aarch64":  # /proc/cpuinfo is the host's under qemu-user
        read = ctypes.CDLL(None).getauxval
        read.restype, read.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
        words = {entry: read(entry) for entry in _ARM_FLAGS}
        return frozenset(
            flag
            for entry, bits in _ARM_FLAGS.items()
            for flag, bit in bits.items()
            if words[entry] >> bit & 1
        )
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def runs_here(target: Target) -> bool:
    """Whether the CPU of this machine runs what is compiled for `target`, and no GPU is asked for."""
    return target.device == "cpu" and not missing_features(target)


def missing_features(target: Target) -> tuple[str, ...]:
    """What of `target`'s CPU this machine lacks: a machine of its kind, or flags."""
    if target.machine != platform.machine():
        return (f"an {target.machine} CPU",)
    return tuple(sorted(target.features - host_features()))


def find_target(name: str, records: str | None = None) -> Target:
    """The target called `name`, with a file of `records` if given.

    ``native`` is the most capable CPU entry that this machine supports.

    ``cuda`` may name architectures and host, as in ``cuda:sm_80+sm_90@x86-64-v4``; ``aarch64:CORE`` is tuned
    for a core; a path that ends in ``.toml`` is a target of the user's own (`moqc.machines.user`).

    Raises TargetError with the known names.
    """
    found = _find_target(name)
    return found if records is None else replace(found, records=records)


def _find_target(name: str) -> Target:
    if name == "native":
        fitting = [target for target in TARGETS.values() if runs_here(target)]
        if not fitting:
            raise TargetError(f"native: moqc has no kernels for this {platform.machine()} CPU")
        return max(fitting, key=lambda target: len(target.features))
    if name.endswith(".toml"):
        return read_target(Path(name), find_target)
    if name.startswith(("cuda:", "cuda@")):
        return find_cuda(name)
    if name.startswith("aarch64:"):
        return find_cpu(name)
    if name not in TARGETS:
        raise TargetError(f"unknown target {name!r}: known are native, {', '.join(TARGETS)}, FILE.toml")
    return TARGETS[name]
