"""64-bit ARM CPUs under Linux: by what their dot products are, or by the name LLVM has for the core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moqc.errors import TargetError
from moqc.machines.target import Roofline, Target

TRIPLE = "aarch64-linux-gnu"
_NEON = frozenset({"asimd"})
_DOT = _NEON | {"asimdhp", "asimddp"}
_LIBRARY = (530_000, 1_050_000)
_VERIFIED = "under qemu-user: packed kernels against the reference, tiny-moe's logits; not on a board"

CORES = {
    "aarch64-neon": ("cortex-a53", "cortex-a72"),
    "aarch64": ("cortex-a55", "cortex-a76", "cortex-a78", "cortex-a78ae", "neoverse-n1", "apple-m1"),
    "aarch64-i8mm": (
        *("cortex-a710", "cortex-x2", "neoverse-n2", "neoverse-v1", "neoverse-v2"),
        *("apple-m2", "apple-m3", "apple-m4"),
    ),
}
"""Row of `AARCH64` -> the cores, by LLVM's names, that have what it asks for and not more."""


def _tvm(*attributes: str, core: str = "generic") -> dict[str, Any]:
    # No SVE: the kernels do not use it, and an artifact should run on more than one core.
    mattr = [*attributes, "-sve", "-sve2"]
    return {"kind": "llvm", "mtriple": TRIPLE, "mcpu": core, "mattr": mattr}


AARCH64 = (
    Target(
        "aarch64-neon",
        _tvm("+neon"),
        _NEON,
        machine="aarch64",
        library_bytes=_LIBRARY,
        verified=_VERIFIED,
        doc="any 64-bit ARM (Raspberry Pi 3 and 4)",
    ),
    Target(
        "aarch64",
        _tvm("+v8.2a", "+fullfp16", "+dotprod"),
        _DOT,
        machine="aarch64",
        library_bytes=_LIBRARY,
        verified=_VERIFIED,
        doc="64-bit ARM with dot products (2018 on: Raspberry Pi 5, Jetson, Graviton 2, Apple M1); "
        "aarch64:CORE tunes for one, such as aarch64:cortex-a76",
    ),
    Target(
        "aarch64-i8mm",
        _tvm("+v8.2a", "+fullfp16", "+dotprod", "+i8mm"),
        _DOT | {"i8mm"},
        machine="aarch64",
        library_bytes=_LIBRARY,
        verified=_VERIFIED,
        doc="64-bit ARM with int8 matrix products (Cortex-A710, Graviton 3, Apple M2 on)",
    ),
)


def find_core(name: str) -> Target:
    """The target of ``aarch64:CORE``. Raises TargetError with the known cores."""
    core = name.partition(":")[2]
    for row in AARCH64:
        if core in CORES[row.name]:
            tvm = {**row.tvm, "mcpu": core}
            return replace(row, name=name, tvm=tvm, roofline=ROOFLINES.get(core), doc=f"{core} under Linux")
    known = ", ".join(core for cores in CORES.values() for core in cores)
    raise TargetError(f"target {name!r}: unknown core {core!r}: known are {known}")


_INSTRUCTIONS = 0.2354
"""Instructions a 2-bit weight takes (benchmarks/results/aarch64-instructions.json)."""


def _data_sheet(machine: str, bandwidth: float, cores: int, clock: float, pipes: int) -> Roofline:
    """What a machine with `cores` cores of `pipes` vector pipes each reaches at best."""
    source = (
        f"{machine}: data sheet's memory bandwidth; {cores} cores of {clock / 1e9:g} GHz with {pipes} vector "
        "pipes, kept full by the counted instructions; nothing else is counted: upper bounds, not measured"
    )
    return Roofline(bandwidth, cores * clock * pipes / _INSTRUCTIONS, 0.0, source)


ROOFLINES: dict[str, Roofline] = {
    "cortex-a72": _data_sheet("Raspberry Pi 4, LPDDR4-3200 x32", 12.8e9, 4, 1.5e9, 2),
    "cortex-a76": _data_sheet("Raspberry Pi 5, LPDDR4X-4267 x32", 17.1e9, 4, 2.4e9, 2),
    "apple-m1": _data_sheet("Apple M1, LPDDR4X-4266 x128, performance cores", 68.3e9, 4, 3.2e9, 4),
}
"""Core -> the machine it is best known from."""
