"""The instruction families by the name that `moqc.machines.target.Target.dot` has for them."""

from __future__ import annotations

from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.neon import Dotprod, I8mm, Neon
from moqc.schedules.cpu.x86 import MultiplyAdd, Vnni

FAMILIES: dict[str, DotFamily] = {
    family.name: family
    for family in (
        Vnni("vnni512-amx", 16, 8, affine=True, amx=True),
        Vnni("vnni512-gfni", 16, 8, affine=True),
        Vnni("vnni512", 16, 8),
        MultiplyAdd("bw512", 16, 8),
        MultiplyAdd("avx2", 8, 4),
        Dotprod("dotprod", 4, 4),
        I8mm("i8mm", 4, 4),
        Neon("neon", 4, 4),
    )
}
