"""Build the layers to be timed, no GPU needed: ``python benchmarks/layer_kernels.py OUT [CASE...]``.

Writes a library (sm_90) for each shape and case and, beside it, a list of its functions.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import tvm
from cases import CASES, experts_shape
from workload import SHAPES

from moqc.schedules.cuda import toolchain
from moqc.schedules.cuda.layer import experts_function, grouped_from


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
