"""What every ingredient of the default plan contributes: the same budget with one of them changed.

    python benchmarks/ablation.py MODEL --bits 2.5 --folder DIR --cache DIR

`--folder` as for quality.py. Prints a Markdown table: loss increase over the unquantized model, in nats, on
the four domains and on each unseen file.
"""

from __future__ import annotations

import argparse
from concurrent.futures import as_completed

from workers import add_options, bench, context, prepare, processes

from moqc.calibrate.quantize import quantize_experts
from moqc.ir.annotations import BITS
from moqc.passes.pipeline import Pipeline
from moqc.pipelines import Debug, run_passes

TRELLIS = "tcq1-g128+tcq2-g128+tcq3-g128+int4-g128-s8"
MANY = "int1-g128+int1-g64+int2-g128+int2-g64+int3-g128+int3-g64+int4-g128+int4-g64"


def analyses(options: str = "", prior: str = "0.5", rotate: str = "true") -> str:
    """The default ones with other options of measure-costs."""
    given = f"curvature=token prior={prior} rotate={rotate} {options}".strip()
    return f"profile-channels,measure-gradients,measure-costs{{{given}}}"


VARIANTS = {
    "default": (analyses(), "", "gptq"),
    "prior 0": (analyses(prior="0.0"), "", "gptq"),
    "prior 0.05": (analyses(prior="0.05"), "", "gptq"),
    "prior 0.1": (analyses(prior="0.1"), "", "gptq"),
    "prior 0.25": (analyses(prior="0.25"), "", "gptq"),
    "prior 1": (analyses(prior="1.0"), "", "gptq"),
    "inputs of down not rotated": (analyses(rotate="false"), "", "gptq"),
    "curvature by block": (
        "profile-channels,measure-sensitivity,measure-costs{prior=0.5 rotate=true}", "", "gptq",
    ),
    "no curvature": ("profile-channels,measure-costs{prior=0.5 rotate=true}", "", "gptq"),
    "costs of round-to-nearest": (analyses("quantizer=rtn"), "", "gptq"),
    "mean + 0.5 std over datasets": (analyses("robustness=0.5"), "", "gptq"),
    "mean + 1 std over datasets": (analyses("robustness=1.0"), "", "gptq"),
    "gate and up tied": (analyses(), " tie=gate-up", "gptq"),
    "whole experts": (analyses(), " tie=expert", "gptq"),
    "at most 2 classes a block": (analyses(), " classes=2", "gptq"),
    "at most 3 classes a block": (analyses(), " classes=3", "gptq"),
    "every block the same bits (MxMoE's problem)": (analyses(), " allocator=mxmoe", "gptq"),
    "more formats": (analyses(f"formats={MANY}"), "", "gptq"),
    "trellis formats": (analyses(f"formats={TRELLIS}"), "", "gptq"),
    "one format (no allocation)": (analyses(), " allocator=uniform", "gptq"),
    "default plan, rounded to nearest": (analyses(), "", "rtn"),
    "default plan, HQQ": (analyses(), "", "hqq"),
    "default plan, MC-MoE's quantizer": (analyses(), "", "mcmoe"),
}  # fmt: skip
"""Name -> (passes before allocate-bits, options of it, quantizer)."""


def measure(name: str, bits: str, seed: int) -> list[float]:
    """Expert file bits a weight, increase on the domains, and on every unseen file."""
    passes, allocation, quantizer = VARIANTS[name]
    ctx, opened = context(seed), bench()
    reference = opened.measure(None, {})
    mod = run_passes(Pipeline.parse(passes), opened.mod, ctx, Debug())
    mod = run_passes(Pipeline.parse(f"allocate-bits{{bits={bits}{allocation}}}"), mod, ctx, Debug())
    store = quantize_experts(
        opened.checkpoint,
        BITS.of(mod),
        quantizer,
        ctx.calibration,
        opened.workspace,
        rotate=quantizer == "gptq" and "rotate=true" in passes,
    )
    found = opened.measure(store, {})
    size = opened.expert_bits(store) / opened.counts.expert_weights
    unseen = found["unseen"]["files"]
    return [
        size,
        found["text"]["loss"] - reference["text"]["loss"],
        *(loss - reference["unseen"]["files"][file] for file, loss in unseen.items()),
    ]


def main() -> None:
    """Run all variants at each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("--bits", default="2.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    columns = ["variant", "bits", "expert file bits", "increase", *options.unseen]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    with processes(options) as pool:
        prepare(pool, [(Pipeline.parse(VARIANTS[name][0]), options.seed) for name in options.only])
        jobs = {
            pool.submit(measure, name, bits, options.seed): (name, bits)
            for bits in options.bits.split(",")
            for name in options.only
        }
        for done in as_completed(jobs):
            cells = [*jobs[done], *(f"{value:.4f}" for value in done.result())]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
