"""Build the layers to be timed, no GPU needed: ``python benchmarks/layer_kernels.py OUT [CASE...]``.

Writes a library (sm_90) for each shape and case and, beside it, a list of its functions. With ``--plans``
such as ``A:64=w14p28u16k1d1m24+w11p32u14k1d1m24,8=w16p28u16k1d2m8+w8t8r2m8i2`` (tokens = gate_up + down),
the variant A has these; that is how pairs for more than 8 tokens are chosen.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import tvm
from cases import CASES, experts_shape
from workload import SHAPES

from moqc.schedules.cuda import toolchain
from moqc.schedules.cuda.layer import experts_function, grouped_from
from moqc.schedules.cuda.templates import AnyPlan, parse_plan


def parse_plans(text: str) -> tuple[str, dict[str, AnyPlan]]:
    """The name of a variant, and its plans by kernel."""
    name, _, rest = text.partition(":")
    chosen = {}
    for item in filter(None, rest.split(",")):
        tokens, _, pair = item.partition("=")
        for kernel, plan in zip(("gate_up", "down"), pair.split("+"), strict=True):
            chosen[f"{kernel}_{tokens}"] = parse_plan(plan)
    return name, chosen


def build(shape: str, case: str, out: Path, variant: str, chosen: dict[str, AnyPlan]) -> None:
    """Compile the function of one layer."""
    layer, begin = experts_shape(shape, case), time.time()
    name = f"{shape}_{case}_{variant}".replace("-", "_")
    function = experts_function(layer, grouped=grouped_from(layer), chosen=chosen)
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024}, host="llvm")
    with target:
        mod = tvm.IRModule({name: function.with_attr("global_symbol", name)})
        library = tvm.compile(mod, target=target)
    library.export_library(str(out / f"{name}.so"))
    functions = [{"name": name, "shape": shape, "case": case, "variant": variant}]
    (out / f"{name}.json").write_text(json.dumps({"functions": functions, "cases": {case: CASES[case]}}))
    print(f"{name}: {time.time() - begin:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--plans", type=parse_plans, default=("default", {}))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    toolchain.prepare(["sm_90"])
    for case in options.cases:
        for shape in options.shapes:
            build(shape, case, options.out, *options.plans)


if __name__ == "__main__":
    main()
