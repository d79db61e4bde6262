"""`moqc plan` on models of real size: how long it takes, and its bytes beside those of the graph it predicts.

    python benchmarks/plan_sizes.py qwen3-30b-a3b mixtral-8x7b gpt-oss-20b deepseek_v3

A name is one that `moqc synth` knows, or a model type of transformers, whose default configuration is taken.
The graph is exported and given packed weights of one format, as `moqc synth --packed` does; instead of
writing them, the bytes of its parameters are added up.
"""

from __future__ import annotations

import argparse
import math
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moqc
from moqc.frontend.hf import import_model
from moqc.frontend.synthetic import SyntheticCheckpoint, read_declared, stored_dtype, write_metadata
from moqc.ir.annotations import PARAMS
from moqc.options import Debug
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.synthesize_weights import SynthesizeWeights
from moqc.pipelines import run_passes
from moqc.targets import find_target

FORMAT, LINEARS = "int3-g128", "int8-g64-sym"


def graph_bytes(config: str) -> tuple[int, str]:
    """Stored bytes of all parameters of the compiled graph, and the dtype of what is not packed."""
    target = find_target("native")
    with tempfile.TemporaryDirectory() as folder:
        parsed = write_metadata(Path(folder), read_declared(config, None), config)
        checkpoint = SyntheticCheckpoint(Path(folder), parsed, config, 0)
        mod = import_model(checkpoint, latent=target.latent_attention)
        weights = SynthesizeWeights(experts=(FORMAT,), linears=LINEARS, activations="int8")
        mod = run_passes(Pipeline((weights,)), mod, PassContext(target, checkpoint), Debug())
        dtype, names = stored_dtype(parsed), PARAMS.of(mod)
        parameters = list(mod["main"].params)[-len(names) :]
        total = 0
        for name, parameter in zip(names, parameters, strict=True):
            count = math.prod(int(extent) for extent in parameter.ty.shape)
            kept = str(parameter.ty.dtype) == "float32" and not name.endswith(".table")
            total += count * (dtype.itemsize if kept else np.dtype(str(parameter.ty.dtype)).itemsize)
    return total, str(dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    moqc.plan("olmoe-1b-7b", bits=3.0)  # imports
    print(
        "| model | plan, CPU s | predicted bytes | bytes of the graph | difference |\n|---|---|---|---|---|"
    )
    for name in options.models:
        config = name
        with tempfile.TemporaryDirectory() as folder:
            if name in CONFIG_MAPPING:
                CONFIG_MAPPING[name](dtype="bfloat16").save_pretrained(folder)
                config = folder
            start = time.process_time()
            plan = moqc.plan(config, bits=3.2, allocator="uniform")
            seconds = time.process_time() - start
            predicted = plan.chosen.stored.parameter_bytes
            found, _ = graph_bytes(config)
        share = predicted / found - 1
        print(f"| {name} | {seconds:.1f} | {predicted:,} | {found:,} | {share:+.3%} |", flush=True)
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
