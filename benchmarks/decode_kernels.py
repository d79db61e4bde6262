"""Build the decode kernels to be timed, no GPU needed: ``python benchmarks/decode_kernels.py OUT [--sweep]``.

Writes ``OUT/kernels.so`` (sm_90) and ``OUT/kernels.json``, which lists the kernels. Without ``--sweep``
only the default plans are built.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tvm
from workload import SHAPES

from moqc.quant.formats import Format
from moqc.schedules.cuda import toolchain
from moqc.schedules.cuda.experts import down_kernel, gate_up_kernel, route_kernel
from moqc.schedules.cuda.plan import (
    SHARED_BYTES,
    ExpertsShape,
    Plan,
    down_plan,
    gate_up_plan,
    shared_bytes,
)

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
    # Every projection in classes of its own, as the allocator emits them.
    "mixed-global": (
        ("int3-g64", "int2-g64"),
        ("int3-g64", "int2-g64", "int1-g64"),
        ("int4-g64", "int3-g64"),
    ),
}
BASIC = ("w4", "w3", "w2", "w1", "mixed")


@dataclass(frozen=True)
class Entry:
    """One kernel of the library."""

    name: str
    kind: str
    shape: str
    case: str
    plan: Plan


def experts_shape(shape: str, case: str) -> ExpertsShape:
    """The layer a case is about."""
    s = SHAPES[shape]
    gate, up, down = (tuple(map(Format.parse, names)) for names in CASES[case])
    return ExpertsShape(s.experts, s.top_k, s.hidden, s.intermediate, gate, up, down)


GATE_UP = {  # shape, tokens -> (tiles, stages, in registers, items)
    ("mixtral-8x7b", 1): [(14, 2, True, 1), (14, 4, True, 1), (14, 3, False, 1)],
    ("mixtral-8x7b", 8): [
        (8, 2, True, 7),
        (8, 4, True, 7),
        (4, 2, True, 14),
        (4, 3, False, 14),
        (7, 3, False, 8),
    ],
    ("qwen3-30b-a3b", 1): [(1, 2, True, 1), (2, 2, True, 1), (2, 3, False, 1)],
    ("qwen3-30b-a3b", 8): [
        (2, 2, True, 4),
        (4, 2, True, 2),
        (4, 2, True, 3),
        (4, 3, False, 2),
        (2, 3, False, 6),
    ],
    ("olmoe-1b-7b", 1): [(1, 2, True, 1), (2, 2, True, 1), (4, 3, False, 1)],
    ("olmoe-1b-7b", 8): [
        (2, 2, True, 4),
        (4, 2, True, 2),
        (4, 2, True, 4),
        (4, 3, False, 2),
        (4, 3, False, 4),
    ],
}
DOWN = {  # shape, tokens -> (warps, tiles, stages, in registers, items)
    ("mixtral-8x7b", 1): [(16, 16, 2, True, 1), (16, 16, 4, True, 1), (16, 16, 3, False, 1)],
    ("mixtral-8x7b", 8): [(8, 8, 2, True, 2), (8, 8, 2, True, 4), (8, 8, 3, False, 4), (8, 4, 2, True, 8)],
    ("qwen3-30b-a3b", 1): [(12, 2, 2, True, 1), (8, 2, 2, True, 1)],
    ("qwen3-30b-a3b", 8): [(8, 8, 2, True, 2), (8, 8, 2, True, 4), (8, 8, 3, False, 2), (8, 4, 2, True, 4)],
    ("olmoe-1b-7b", 1): [(16, 2, 2, True, 1), (8, 2, 2, True, 1)],
    ("olmoe-1b-7b", 8): [(8, 8, 2, True, 2), (8, 8, 2, True, 4), (8, 8, 3, False, 2), (8, 4, 2, True, 4)],
}


def _fits(plan: Plan, projections: int, formats: set[Format]) -> bool:
    """Whether a candidate can work, and its window leaves registers for the rest."""
    if not plan.registers:
        return shared_bytes(plan, projections, list(formats)) <= SHARED_BYTES
    return plan.stages * max(fmt.bits for fmt in formats) <= (8 if plan.warps == 16 else 16)


def _name(*parts: object) -> str:
    """A symbol name."""
    return "_".join(map(str, parts)).replace("-", "_")


def sweep(cases: Iterable[str]) -> Iterator[Entry]:
    """Candidate plans of every shape, case and number of tokens that fit."""
    for (shape, tokens), candidates in GATE_UP.items():
        warps = SHAPES[shape].hidden // 256
        for case in cases:
            layer = experts_shape(shape, case)
            for candidate in candidates:
                plan = Plan(warps, *candidate[:3], tokens, candidate[3])
                if _fits(plan, 2, {*layer.gate, *layer.up}):
                    yield Entry(_name("gate_up", shape, case, plan), "gate_up", shape, case, plan)
            for candidate in DOWN[shape, tokens]:
                plan = Plan(*candidate[:4], tokens, candidate[4])
                if _fits(plan, 1, set(layer.down)):
                    yield Entry(_name("down", shape, case, plan), "down", shape, case, plan)


def defaults(cases: Iterable[str]) -> Iterator[Entry]:
    """The product's own plans of every shape, case and number of tokens."""
    for shape in SHAPES:
        for case in cases:
            layer = experts_shape(shape, case)
            for tokens in (1, 8):
                for kind, choose in (("gate_up", gate_up_plan), ("down", down_plan)):
                    plan = choose(layer, tokens)
                    yield Entry(_name(kind, shape, case, plan), kind, shape, case, plan)


def build(entries: list[Entry], out: Path, name: str) -> None:
    """Compile `entries` and a route kernel for each shape into one library."""
    toolchain.prepare(["sm_90"])
    functions = {}
    for shape in SHAPES:
        functions[_name("route", shape)] = route_kernel(experts_shape(shape, "w4"), "int32")
    for entry in entries:
        layer = experts_shape(entry.shape, entry.case)
        if entry.kind == "gate_up":
            functions[entry.name] = gate_up_kernel(layer, entry.plan, "float16")
        else:
            functions[entry.name] = down_kernel(layer, entry.plan)
    named = {key: function.with_attr("global_symbol", key) for key, function in functions.items()}
    target = tvm.target.Target(
        {"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024, "thread_warp_size": 32}, host="llvm"
    )
    begin = time.time()
    with target:
        library = tvm.compile(tvm.IRModule(named), target=target)
    library.export_library(str(out / f"{name}.so"))
    listed = [{**asdict(entry), "plan": asdict(entry.plan)} for entry in entries]
    cases = {entry.case: CASES[entry.case] for entry in entries}
    (out / f"{name}.json").write_text(json.dumps({"kernels": listed, "cases": cases}))
    print(f"{len(entries)} kernels in {time.time() - begin:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--sweep", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    entries = sweep(BASIC) if arguments.sweep else defaults(CASES)
    build(list(entries), arguments.out, "kernels")


if __name__ == "__main__":
    main()
