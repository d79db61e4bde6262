"""CPUs by name: targets of their own, and the hosts of GPUs."""

from __future__ import annotations

from moqc.errors import TargetError
from moqc.machines.aarch64 import AARCH64, find_core
from moqc.machines.target import Target
from moqc.machines.x86 import X86

CPUS: dict[str, Target] = {target.name: target for target in (*X86, *AARCH64)}


def find_cpu(name: str) -> Target:
    """The CPU called `name`: a row of `CPUS`, or ``aarch64:CORE``. Raises TargetError."""
    if name.startswith("aarch64:"):
        return find_core(name)
    if name not in CPUS:
        raise TargetError(f"unknown host {name!r}: known are {', '.join(CPUS)}, aarch64:CORE")
    return CPUS[name]
