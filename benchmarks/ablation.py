"""What every ingredient of the default plan contributes: the same budget with one of them changed.

    python benchmarks/ablation.py MODEL --bits 2.5 --folder DIR --cache DIR

`--folder` as for quality.py. Prints a Markdown table: loss increase over the unquantized model, in nats, on
the four domains and on each unseen file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import replace
from typing import Any

from torch import Tensor
from workers import add_options, bench, context, prepare, processes, set_threads

from moqc.calibrate.quantize import QUANTIZERS, quantize_experts
from moqc.ir.annotations import BITS
from moqc.passes.allocation_problem import OWN_FORMATS
from moqc.passes.measure_costs import FORMATS
from moqc.passes.pipeline import Pipeline
from moqc.passes.quantize_experts import protections
from moqc.pipelines import ASYMMETRIC_FORMATS, COSTS_BY, Debug, run_passes
from moqc.quant import gptq
from moqc.quant.formats import Format
from moqc.quant.quantizers import STORABLE
from moqc.quant.tensor import Quantized
from moqc.quant.versions import QUANTIZER_VERSIONS
from moqc.recipe import PRIOR

ASYMMETRIC = "+".join(ASYMMETRIC_FORMATS)
MANY = (
    "int1-g128-sym-s8+int1-g64-s8+int2-g128-sym-s8+int2-g64-s8+int3-g128-sym-s8+int3-g64-s8+int4-g128-s8+"
    "int4-g128-sym-s8"
)


def analyses(options: str = "", **changed: object) -> str:
    """The default ones with other options of measure-costs."""
    given = {"quantizer": COSTS_BY, "curvature": "expert", "prior": PRIOR, "rotate": "true"} | changed
    text = " ".join([*(f"{name}={value}" for name, value in given.items()), options]).strip()
    slopes = "measure-sensitivity" if given["curvature"] == "block" else "measure-gradients"
    return f"profile-channels,{slopes},measure-costs{{{text}}}"


def register(name: str, sweeps: int = gptq.SWEEPS, **options: Any) -> None:
    """A quantizer that is gptq with other options."""

    def together(w: Tensor, hessian: Tensor, formats: Sequence[Format]) -> list[Quantized]:
        default, gptq.SWEEPS = gptq.SWEEPS, sweeps
        try:
            return [made for made, _ in gptq.quantize_gptq_each(w, hessian, formats, **options)]
        finally:
            gptq.SWEEPS = default

    def run(w: Tensor, hessian: Tensor | None, fmt: Format) -> Quantized:
        assert hessian is not None
        return together(w, hessian, [fmt])[0]

    STORABLE[name] = replace(STORABLE["gptq"], run=run, together=together)
    QUANTIZERS[name], QUANTIZER_VERSIONS[name] = name, QUANTIZER_VERSIONS["gptq"]


# In every process: this module is the main one of all of them.
register("gptq-no-descent", sweeps=0)
register("gptq-no-order", act_order=False)
register("gptq-damping-0.01", damping=0.01)

VARIANTS = {
    "default": (analyses(), "", "gptq"),
    **{f"prior {p}": (analyses(prior=p), "", "gptq") for p in (0.0, 0.25, 0.5, 0.75, 1.0)},
    "costs of GPTQ": (analyses(quantizer="gptq"), "", "gptq"),
    "costs of GPTQ, on tokens held out": (analyses(quantizer="gptq", held_out="true"), "", "gptq"),
    "costs of GPTQ, prior 0.25": (analyses(quantizer="gptq", prior=0.25), "", "gptq"),
    "formats with zero points": (analyses(f"formats={ASYMMETRIC}"), "", "gptq"),
    "more formats": (analyses(f"formats={MANY}"), "", "gptq"),
    "inputs of down not rotated": (analyses(rotate="false"), "", "gptq"),
    "curvature by token": (analyses(curvature="token"), "", "gptq"),
    "curvature by block": (analyses(curvature="block"), "", "gptq"),
    "no curvature": (analyses(curvature="block").replace("measure-sensitivity,", ""), "", "gptq"),
    "mean + 0.5 std over datasets": (analyses("robustness=0.5"), "", "gptq"),
    "gate and up tied": (analyses(), " tie=gate-up", "gptq"),
    "whole experts": (analyses(), " tie=expert", "gptq"),
    "at most 2 classes a block": (analyses(), " classes=2", "gptq"),
    "MxMoE": (
        f"profile-channels,measure-costs{{formats={'+'.join(OWN_FORMATS['mxmoe'])} rotate=true}}",
        " allocator=mxmoe", "gptq",
    ),
    "MxMoE from the default formats": (
        f"profile-channels,measure-costs{{formats={'+'.join(FORMATS)} rotate=true}}",
        f" allocator=mxmoe formats={'+'.join(FORMATS)}", "gptq",
    ),
    "one format (no allocation)": ("", " allocator=uniform", "gptq"),
    "default plan, rounded to nearest": (analyses(), "", "rtn"),
    "default plan, AWQ's clip search": (analyses(), "", "awq"),
    "default plan, no descent after GPTQ": (analyses(), "", "gptq-no-descent"),
    "default plan, columns in order": (analyses(), "", "gptq-no-order"),
    "default plan, damping 0.01": (analyses(), "", "gptq-damping-0.01"),
    "1 % of the channels protected": (f"{analyses()},protect-channels", "", "gptq"),
    "super experts pinned": (f"profile-activation,{analyses()},score-experts", "", "gptq"),
}  # fmt: skip
"""Name -> (passes before allocate-bits, options of it, quantizer)."""


def measure(name: str, bits: str, seed: int) -> list[float]:
    """Expert file bits a weight, increase on the domains, and on every unseen file."""
    passes, allocation, quantizer = VARIANTS[name]
    ctx, opened = context(seed), bench()
    set_threads(trellis=False)
    reference = opened.measure(None, {})
    chosen = f"{passes},allocate-bits{{bits={bits}{allocation}}}".lstrip(",")
    mod = run_passes(Pipeline.parse(chosen), opened.mod, ctx, Debug())
    store = quantize_experts(
        opened.checkpoint,
        BITS.of(mod),
        quantizer,
        ctx.calibration,
        opened.workspace,
        rotate=quantizer.startswith("gptq") and "rotate=false" not in passes,
        protections=protections(mod),
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
        measured = [VARIANTS[name][0] for name in options.only if VARIANTS[name][0]]
        prepare(pool, [(Pipeline.parse(text), options.seed) for text in measured])
        jobs = {
            pool.submit(measure, name, bits, options.seed): (name, bits)
            for bits in options.bits.split(",")
            for name in options.only
        }
        for done in as_completed(jobs):
            if (error := done.exception()) is not None:  # of the others there are results
                print(f"{', '.join(jobs[done])}: {error}", file=sys.stderr, flush=True)
                continue
            cells = [*jobs[done], *(f"{value:.4f}" for value in done.result())]
            print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(any(job.exception() is not None for job in jobs))


if __name__ == "__main__":
    main()
