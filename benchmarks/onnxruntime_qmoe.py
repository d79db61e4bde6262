"""One experts block of a known model: moqc's beside onnxruntime's QMoE node on the CPU, on the same threads.

    pip install onnxruntime onnx
    python benchmarks/onnxruntime_qmoe.py [--shape qwen3-30b-a3b] [--tokens 1,32,512] [--rounds 3]

Both take activations and give the weighted sum; weights are random, codes of 4 and 8 bits in blocks of 64
for QMoE (it has no other widths on CPUs), moqc's formats in groups of 64. QMoE routes by itself, with a
softmax over random scores; moqc is given experts and weights. Sides alternate, each in a process of its own;
a row is the median of the rounds, each the median of its calls, weights hot.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

BLOCK = 64
SECONDS = 0.7


def qmoe(shape: Any, bits: int, threads: int) -> Callable[[int], Callable[[], object]]:
    """Number of tokens -> a call of the node."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    experts, hidden, inner = shape.experts, shape.hidden, shape.intermediate

    def matrix(name: str, rows: int, columns: int) -> list[Any]:
        size = (experts, rows, columns * bits // 8)
        codes = np.frombuffer(generator.bytes(int(np.prod(size))), np.uint8).reshape(size)
        scales = generator.uniform(0.001, 0.02, (experts, rows, columns // BLOCK)).astype(np.float32)
        return [numpy_helper.from_array(codes, name), numpy_helper.from_array(scales, f"{name}_scales")]

    tensors = [*matrix("fc1", 2 * inner, hidden), *matrix("fc2", hidden, inner)]
    node = helper.make_node(
        "QMoE",
        ["x", "scores", "fc1", "fc1_scales", "", "fc2", "fc2_scales"],
        ["y"],
        domain="com.microsoft",
        k=shape.top_k,
        activation_type="swiglu",
        swiglu_fusion=1,
        activation_alpha=1.0,
        activation_beta=0.0,
        normalize_routing_weights=1,
        expert_weight_bits=bits,
        block_size=BLOCK,
    )
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "block",
        [value("x", TensorProto.FLOAT, ["t", hidden]), value("scores", TensorProto.FLOAT, ["t", experts])],
        [value("y", TensorProto.FLOAT, ["t", hidden])],
        tensors,
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def calls(tokens: int) -> Callable[[], object]:
        feed = {
            "x": generator.standard_normal((tokens, hidden), np.float32),
            "scores": generator.standard_normal((tokens, experts), np.float32),
        }
        return lambda: session.run(None, feed)

    return calls


def moqc(shape: Any, fmt: str, threads: int) -> Callable[[int], Callable[[], object]]:
    """The same for moqc's block."""
    from moqc.runtime.tvm_runtime import use_threads

    use_threads(threads)
    import tvm

    from moqc.bench.layer import Layer
    from moqc.passes.legalize import LOWERINGS
    from moqc.quant.formats import Format
    from moqc.targets import find_target

    target = find_target("native")
    layer = Layer(target, shape, [Format.parse(fmt)], 0)
    run = layer.compile(LOWERINGS[target.schedules].operators["relax.moqc.mixed_experts"])["block"]

    def calls(tokens: int) -> Callable[[], object]:
        arguments = [tvm.runtime.tensor(each) for each in layer.inputs(tokens)]
        return lambda: run(*arguments, *layer.sets[0])

    return calls


SIDES: dict[str, tuple[Callable[..., Any], Any]] = {
    "onnxruntime QMoE 4": (qmoe, 4),
    "onnxruntime QMoE 8": (qmoe, 8),
    **{f"moqc W{bits}": (moqc, f"int{bits}-g64") for bits in (8, 4, 3, 2, 1)},
}


def median_us(call: Callable[[], object]) -> float:
    call()
    times: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", default="1,32,512")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=list(SIDES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    counts = [int(count) for count in options.tokens.split(",")]
    if options.side:
        from moqc.bench.shapes import find_shape

        make, argument = SIDES[options.side]
        calls = make(find_shape(options.shape), argument, options.threads)
        print(json.dumps([median_us(calls(count)) for count in counts]))
        return
    found: dict[str, list[list[float]]] = {name: [] for name in SIDES}
    for _ in range(options.rounds):
        for name in SIDES:
            command = [sys.executable, *sys.argv, "--side", name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    for at, count in enumerate(counts):
        for name, rounds in found.items():
            us = statistics.median(each[at] for each in rounds)
            row = {"provider": name, "shape": options.shape, "tokens": count, "us": round(us, 1)}
            print(json.dumps(row))


if __name__ == "__main__":
    main()
