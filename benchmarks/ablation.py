"""What every ingredient of the default plan contributes: the same budget with one of them changed.

    python benchmarks/ablation.py MODEL --bits 2.5 --folder DIR --cache DIR

`--folder` as for quality.py. Prints a Markdown table: loss increase over the unquantized model, in nats.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from moqc.calibrate.quantize import quantize_experts
from moqc.evaluate.bench import Bench
from moqc.evaluate.metrics import evaluation_windows
from moqc.evaluate.probes import TextProbe
from moqc.frontend.checkpoint import Checkpoint
from moqc.inputs import open_workspace, read_calibration
from moqc.ir.annotations import BITS
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.pipelines import Debug, run_passes

DOMAINS = ("en_novels", "fr_novels", "math", "multi_misc")
TRELLIS = "int1-g128+tcq1-g128+tcq2-g128+tcq2-g64+tcq3-g128+tcq3-g64+int4-g128+int4-g64-sym-s8"
VARIANTS = {
    "default: curvature by token": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}", "", "gptq",
    ),
    "curvature by block": ("profile-channels,measure-sensitivity,measure-costs", "", "gptq"),
    "no curvature": ("profile-channels,measure-costs", "", "gptq"),
    "costs of round-to-nearest": (
        "profile-channels,measure-gradients,measure-costs{curvature=token quantizer=rtn}",
        "", "gptq",
    ),
    "mean + 0.5 std over datasets": (
        "profile-channels,measure-gradients,measure-costs{curvature=token robustness=0.5}",
        "", "gptq",
    ),
    "mean + 1 std over datasets": (
        "profile-channels,measure-gradients,measure-costs{curvature=token robustness=1.0}",
        "", "gptq",
    ),
    "gate and up tied": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        " tie=gate-up", "gptq",
    ),
    "whole experts": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        " tie=expert", "gptq",
    ),
    "at most 2 classes a block": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        " classes=2", "gptq",
    ),
    "at most 3 classes a block": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        " classes=3", "gptq",
    ),
    "every block the same bits (MxMoE's problem)": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        " allocator=mxmoe", "gptq",
    ),
    "trellis formats too": (
        "profile-channels,measure-gradients,measure-costs{curvature=token formats=" + TRELLIS + "}",
        "", "gptq",
    ),
    "one format (no allocation)": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        " allocator=uniform", "gptq",
    ),
    "default plan, rounded to nearest": (
        "profile-channels,measure-gradients,measure-costs{curvature=token}",
        "", "rtn",
    ),
}  # fmt: skip
"""Name -> (passes before allocate-bits, options of it, quantizer)."""


def main() -> None:
    """Run all variants at each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--bits", default="2.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS))
    options = parser.parse_args()
    folder, checkpoint = Path(options.folder), Checkpoint.open(Path(options.model))
    workspace = open_workspace(options.cache)
    calibration = read_calibration(
        checkpoint, [folder / f"{name}.calib.txt" for name in DOMAINS], 32_768, options.seed
    )
    texts = [folder / f"{name}.test.txt" for name in DOMAINS]
    windows = evaluation_windows(texts, checkpoint.path / "tokenizer.json", tokens=options.tokens)
    bench = Bench.open(checkpoint, workspace, {"text": TextProbe(windows)})
    ctx = PassContext(checkpoint=checkpoint, calibration=calibration, workspace=workspace, seed=options.seed)
    reference = bench.measure(None, {})["text"]["loss"]
    print(f"unquantized {reference:.4f}\n\n| variant | bits | expert file bits | increase | seconds |")
    print("|---|---|---|---|---|", flush=True)
    for bits in options.bits.split(","):
        for name in options.only:
            analyses, allocation, quantizer = VARIANTS[name]
            start = time.perf_counter()
            text = f"{analyses},allocate-bits{{bits={bits}{allocation}}}"
            mod = run_passes(Pipeline.parse(text), bench.mod, ctx, Debug())
            store = quantize_experts(checkpoint, BITS.of(mod), quantizer, calibration, workspace)
            loss = bench.measure(store, {})["text"]["loss"]
            size = bench.expert_bits(store) / bench.counts.expert_weights
            seconds = time.perf_counter() - start
            print(f"| {name} | {bits} | {size:.4f} | {loss - reference:.5f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
