"""The formats that the GPU benchmarks time: case -> classes of gate, up and down."""

from __future__ import annotations

from workload import SHAPES

from moqc.quant.formats import Format
from moqc.schedules.cuda.plan import ExpertsShape

CASES: dict[str, tuple[tuple[str, ...], ...]] = {
    # case -> formats of gate's, up's and down's classes; expert e takes class e % n.
    "w4": (("int4-g128-sym",),) * 3,
    "w3": (("int3-g128-sym",),) * 3,
    "w2": (("int2-g128-sym",),) * 3,
    "w1": (("int1-g128-sym",),) * 3,
    "mixed": (("int4-g128-sym", "int3-g128-sym", "int2-g128-sym", "int1-g128-sym"),) * 3,
    "w8": (("int8-g128-sym",),) * 3,
    "w4-g64-asym": (("int4-g64",),) * 3,
    "w3-g64-asym": (("int3-g64",),) * 3,
    "w2-g64-asym": (("int2-g64",),) * 3,
    # What `global` chooses from by default.
    "w4-asym-s8": (("int4-g128-s8",),) * 3,
    "w3-s8": (("int3-g128-sym-s8",),) * 3,
    "w2-s8": (("int2-g128-sym-s8",),) * 3,
    "w1-s8": (("int1-g128-sym-s8",),) * 3,
    # Zeros with float16 scales; byte scales in groups of 64.
    "w4-asym": (("int4-g128",),) * 3,
    "w3-asym": (("int3-g128",),) * 3,
    "w2-asym": (("int2-g128",),) * 3,
    "w1-asym": (("int1-g128",),) * 3,
    "w4-s8": (("int4-g128-sym-s8",),) * 3,
    "w2-g64-s8": (("int2-g64-sym-s8",),) * 3,
    # Trellis codes.
    "w1-tcq": (("tcq1-g128",),) * 3,
    "w2-tcq": (("tcq2-g128",),) * 3,
    "w3-tcq": (("tcq3-g128",),) * 3,
    # Every projection in classes of its own, as that allocator emits them.
    "mixed-global": (
        ("int3-g128-sym-s8", "int2-g128-sym-s8", "int1-g128-sym-s8", "int2-g128-sym-s8"),
        ("int2-g128-sym-s8", "int3-g128-sym-s8", "int2-g128-sym-s8", "int1-g128-sym-s8"),
        ("int4-g128-s8", "int3-g128-sym-s8", "int2-g128-sym-s8", "int2-g128-sym-s8"),
    ),
}


def tokens_of(case: str) -> tuple[int, ...]:
    """The numbers of tokens at which a case is timed."""
    return (1, 8, 16, 64, 512, 4096) if case in ("w4", "w3", "w2", "w1", "mixed", "mixed-global") else (1, 8)


def experts_shape(shape: str, case: str) -> ExpertsShape:
    """The layer a case is about."""
    s = SHAPES[shape]
    gate, up, down = (tuple(map(Format.parse, names)) for names in CASES[case])
    return ExpertsShape(s.experts, s.top_k, s.hidden, s.intermediate, gate, up, down)
