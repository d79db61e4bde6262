"""Attention on CPUs with caches of each dtype, in turns: least time of a layer, and its ratio to float32's.

    python benchmarks/kv_cache.py [--threads 2] [--layers 4] [--seconds 1]

A call visits `layers` caches one after the other, as a model does.
"""

import argparse
import json
import time

import numpy as np

from moqc.runtime.tvm_runtime import use_threads

SLOTS = 4112
HEADS = {"qwen3-30b-a3b": (32, 4, 128), "olmoe-1b-7b": (16, 16, 128)}
CALLS = [(1, 512), (1, 4000), (512, 0), (512, 2048)]
"""Tokens of a call, and tokens before."""


def build(heads, dtype):
    """The kernel for one sequence of up to `SLOTS` tokens."""
    import tvm
    from tvm import tirx

    from moqc.schedules.cpu.attention import attention_kernel
    from moqc.schedules.cpu.attention_shape import AttentionShape
    from moqc.targets import find_target

    target, (query, key, width) = find_target("native"), heads
    shape = AttentionShape(
        heads=query, key_heads=key, key_width=width, value_width=width, scale=width**-0.5, window=0,
        softcap=0.0, causal=True, sinks=False, lanes=target.vector_lanes, stored=dtype,
    )  # fmt: skip
    sizes = [tirx.Var(name, "int64") for name in ("batch", "tokens")]
    kernel = attention_kernel(shape, *sizes, (1, SLOTS)).with_attr("global_symbol", "kernel")
    return tvm.compile(tvm.IRModule({"kernel": kernel}), tvm.target.Target(target.tvm))["kernel"]


def measure(kernels, heads, tokens, before, seconds):
    """Least seconds of a layer by dtype; `kernels`: dtype -> kernel and caches of the layers."""
    import tvm

    query, key, width = heads
    random, times = np.random.default_rng(0), {dtype: [] for dtype in kernels}
    sizes = [(1, query, tokens, width), *[(1, key, tokens, width)] * 2]
    inputs = [tvm.runtime.tensor(random.standard_normal(size).astype(np.float32)) for size in sizes]
    inputs.append(tvm.runtime.tensor(np.arange(before, before + tokens)[None]))
    out = tvm.runtime.empty((1, tokens, query, width), "float32")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not times["float32"]:
        for dtype, (kernel, layers) in kernels.items():
            start = time.perf_counter()
            for caches in layers:
                kernel(*inputs, *caches, out)
            times[dtype].append((time.perf_counter() - start) / len(layers))
    return {dtype: min(found) for dtype, found in times.items()}


def main():
    """Print a line for every model and call."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args()
    use_threads(options.threads)
    import tvm

    from moqc.quant.kv_cache import DTYPES, stored_columns

    for model, heads in HEADS.items():
        kernels = {}
        for dtype in DTYPES:
            cache = np.zeros((1, heads[1], SLOTS, stored_columns(dtype, heads[2])), dtype)
            layers = [[tvm.runtime.tensor(cache) for _ in range(2)] for _ in range(options.layers)]
            kernels[dtype] = build(heads, dtype), layers
        for tokens, before in CALLS:
            found = measure(kernels, heads, tokens, before, options.seconds)
            row = {dtype: round(seconds / found["float32"], 3) for dtype, seconds in found.items()}
            about = {"heads": model, "tokens": tokens, "before": before}
            print(json.dumps({**about, "float32_us": round(1e6 * found["float32"], 1), **row}), flush=True)


if __name__ == "__main__":
    main()
