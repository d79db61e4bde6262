"""Build the layers to be timed, no GPU needed: ``python benchmarks/layer_kernels.py OUT [CASE...]``.

Writes a library (sm_90) for each shape and case and, beside it, a list of its functions.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import tvm
from workload import SHAPES

from moqc.quant.formats import Format
from moqc.schedules.cuda import toolchain
from moqc.schedules.cuda.layer import experts_function, grouped_from
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
    # Every projection in classes of its own, as the allocator emits them.
    "mixed-global": (
        ("int3-g64", "int2-g64"),
        ("int3-g64", "int2-g64", "int1-g64"),
        ("int4-g64", "int3-g64"),
    ),
}


def experts_shape(shape: str, case: str) -> ExpertsShape:
    """The layer a case is about."""
    s = SHAPES[shape]
    gate, up, down = (tuple(map(Format.parse, names)) for names in CASES[case])
    return ExpertsShape(s.experts, s.top_k, s.hidden, s.intermediate, gate, up, down)


def build(shape: str, case: str, out: Path) -> None:
    """Compile the function of one layer."""
    layer, begin = experts_shape(shape, case), time.time()
    name = f"{shape}_{case}".replace("-", "_")
    function = experts_function(layer, grouped=grouped_from(layer)).with_attr("global_symbol", name)
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024}, host="llvm")
    with target:
        library = tvm.compile(tvm.IRModule({name: function}), target=target)
    library.export_library(str(out / f"{name}.so"))
    functions = [{"name": name, "shape": shape, "case": case, "variant": "default"}]
    (out / f"{name}.json").write_text(json.dumps({"functions": functions, "cases": {case: CASES[case]}}))
    print(f"{name}: {time.time() - begin:.0f} s", flush=True)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    toolchain.prepare(["sm_90"])
    for case in sys.argv[2:] or CASES:
        for shape in SHAPES:
            build(shape, case, out)


if __name__ == "__main__":
    main()
