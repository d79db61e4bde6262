"""Processor time and peak memory of the front end on models of real sizes, without their weights.

    python benchmarks/export_time.py [SHAPE ...]

A shape is one of `moqc synth`, or ``deepseek-v3`` (671B, transformers' default configuration). Each runs in a
process of its own: build the model on the meta device, export, make the Relax module. Seconds are of the
processor, user and system, so that they mean something on a busy machine; with OMP_NUM_THREADS=1 those of a
quiet machine's clock.
"""

import json
import resource
import subprocess
import sys
import time
from itertools import pairwise

SHAPES = ("qwen3-30b-a3b", "mixtral-8x7b", "gpt-oss-20b", "deepseek-v3")


def measure(shape: str) -> dict[str, float]:
    """Seconds of each step, and the peak of resident memory in GiB."""
    from transformers import AutoConfig, DeepseekV3Config

    from moqc.frontend.hf import export, import_program
    from moqc.frontend.hooks import hook
    from moqc.frontend.skeleton import build_skeleton
    from moqc.frontend.synthetic import read_declared

    marks = [time.process_time()]
    deepseek = shape == "deepseek-v3"
    model = build_skeleton(DeepseekV3Config() if deepseek else AutoConfig.for_model(**read_declared(shape)))
    hook(model)
    marks.append(time.process_time())
    program = export(model)
    marks.append(time.process_time())
    import_program(program, model)
    marks.append(time.process_time())
    build, traced, imported = (end - start for start, end in pairwise(marks))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    return {"parameters": parameters, "build": build, "export": traced, "import": imported, "peak": peak}


def main(shapes: list[str]) -> None:
    """Print a table of `shapes`, all if there are none."""
    print(
        "| shape | parameters (1e9) | build (CPU s) | export (CPU s) | import (CPU s) | peak memory (GiB) |"
    )
    print("|---|---|---|---|---|---|")
    for shape in shapes or SHAPES:
        command = [sys.executable, __file__, "--one", shape]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        numbers = " | ".join(f"{value:.2f}" for value in found.values())
        print(f"| {shape} | {numbers} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])))
    else:
        main(sys.argv[1:])
