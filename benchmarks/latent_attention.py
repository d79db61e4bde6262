"""Latent attention on its latents, and on expanded heads: time of a prompt and of a token after it.

    python benchmarks/latent_attention.py FOLDER [--config deepseek-v2-lite] [--layers 4] [--contexts 64,512]

Writes two artifacts of random weights into FOLDER, and times each in a process of its own: the least of three
prompts, and of the medians of 24 tokens after each.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

MODES = ("latents", "expanded")


def make(options, mode):
    """Compile the first layers with the cache of `mode`; prints the bytes of it that a token takes."""
    from moqc.machines.target import Target

    if mode == "expanded":
        Target.latent_attention = property(lambda self: False)
    from moqc.synthesis import synthesize_artifact

    cache = synthesize_artifact(
        options.config,
        options.folder / mode,
        layers=options.layers,
        context=max(options.contexts) + 64,
        max_batch=1,
        force=True,
    ).cache
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize for shape, dtype in cache.buffers)
    print(json.dumps({"mode": mode, "kv_bytes_a_token": size // (cache.batch * cache.context)}))


def measure(options, mode):
    """Print a line for every context."""
    import moqc
    from moqc.runtime.sampling import Sampling

    artifact, generator = moqc.load(options.folder / mode), np.random.default_rng(0)
    for count in options.contexts:
        prompts, tokens = [], []
        for _ in range(3):
            prompt = generator.integers(3, 500, count).tolist()
            start = time.perf_counter()
            stamps = [time.perf_counter() for _ in artifact.tokens(prompt, Sampling(), max_tokens=25)]
            prompts.append(stamps[0] - start)
            tokens.append(float(np.median(np.diff(stamps))))
        row = {"mode": mode, "context": count, "prompt_s": min(prompts), "token_ms": 1e3 * min(tokens)}
        print(json.dumps(row), flush=True)


def main():
    """Run each step in a process of its own: an artifact is not timed where a compiler is loaded."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--config", default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--contexts", type=lambda text: [int(n) for n in text.split(",")], default=[64, 512, 2048]
    )
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        {"make": make, "measure": measure}[options.step[0]](options, options.step[1])
        return
    for step in ("make", "measure"):
        for mode in MODES:
            subprocess.run([sys.executable, *sys.argv, "--step", step, mode], check=True)


if __name__ == "__main__":
    main()
