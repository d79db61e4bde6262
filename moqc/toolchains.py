"""The compilers and linkers that targets take beside moqc's packages, and how to install what is missing."""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from moqc.errors import TargetError
from moqc.machines.target import Target


@dataclass(frozen=True, slots=True)
class Tool:
    """One tool: any of `programs`, on the PATH or in one of `folders`; `install` is the command to get it."""

    programs: tuple[str, ...]
    what: str
    install: str
    folders: tuple[Path, ...] = ()

    def find(self) -> Path | None:
        """Where it is, or None."""
        for program in self.programs:
            if (found := shutil.which(program)) is not None:
                return Path(found)
        places = (folder / program for folder in self.folders for program in self.programs)
        return next((place for place in places if place.is_file()), None)

    def require(self) -> Path:
        """Where it is. Raises TargetError that says how to install it."""
        found = self.find()
        if found is None:
            places = " or ".join(["on the PATH", *(f"in {folder}" for folder in self.folders)])
            raise TargetError(f"no {self.what} ({', '.join(self.programs)}) {places}: {self.install}")
        return found


_CC = Tool(("cc", "gcc", "clang", "g++"), "linker", "`apt install gcc`")
_CROSS = {
    "aarch64": Tool(
        ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-gcc"),
        "linker for 64-bit ARM",
        "`apt install g++-aarch64-linux-gnu`",
    ),
    "x86_64": Tool(
        ("x86_64-linux-gnu-g++", "x86_64-linux-gnu-gcc"),
        "linker for x86",
        "`apt install g++-x86-64-linux-gnu`",
    ),
}
"""CPU, as `platform.machine` says -> what links libraries for it on another."""
TOOLS = {
    "nvcc": Tool(
        ("nvcc",),
        "CUDA compiler",
        "install the CUDA toolkit, version 12 or later: `apt install cuda-toolkit` from NVIDIA's repository",
        (Path("/usr/local/cuda/bin"),),
    ),
}
"""Entry of `Target.tools` -> tool."""


def linker(machine: str) -> Tool:
    """What links a library for CPU `machine` on this one."""
    return _CC if machine == platform.machine() else _CROSS[machine]


def tools(target: Target) -> tuple[Tool, ...]:
    """All that compiling for `target` takes here."""
    linkers = () if target.launched else (linker(target.machine),)
    return (*(TOOLS[name] for name in target.tools), *linkers)


def check_toolchain(target: Target) -> None:
    """Raise TargetError where `target` needs a tool that is not here: before hours of work."""
    for tool in tools(target):
        tool.require()
