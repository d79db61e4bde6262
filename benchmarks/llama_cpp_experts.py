"""One expert matrix product of a known model: moqc's kernels beside llama.cpp's, hot, on the same threads.

    pip install llama-cpp-python
    python benchmarks/llama_cpp_experts.py [--shape qwen3-30b-a3b] [--tokens 1] [--rounds 3]

Both multiply the same number of tokens with the ``[intermediate, hidden]`` up matrices of the experts a
random routing hits, activations in float32 at both ends. llama.cpp runs GGML_OP_MUL_MAT_ID many times in one
graph, so that starting its threads does not count; moqc's time is that of a call from Python: sorting the
pairs by expert, quantizing the activations, the product. Sides alternate, each in a process of its own,
since both keep threads spinning; a row is the median of the rounds, each the median of its calls.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moqc.runtime.tvm_runtime import use_threads

GGML_TYPES = {"Q4_K": 12, "Q4_0": 2, "Q8_0": 8, "Q3_K": 11, "Q2_K": 10, "IQ2_XS": 17, "IQ1_S": 19}
FORMATS = "int4-g128-s8,int3-g128-sym-s8,int2-g128-sym-s8,int1-g128-sym-s8"
F32, I32 = 0, 26
SECONDS = 0.4


class Ggml:
    """The few functions of ggml that one operator needs, from the package's shared libraries."""

    def __init__(self, threads: int) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        self._threads = threads
        for name in ("init", "new_tensor_2d", "new_tensor_3d", "mul_mat_id", "new_graph", "get_data"):
            getattr(self._base, f"ggml_{name}").restype = ctypes.c_void_p
        self._base.ggml_quantize_chunk.restype = ctypes.c_size_t
        self._cpu.ggml_cpu_init()

    def product(
        self, kind: int, matrix: np.ndarray, experts: int, ids: np.ndarray, x: np.ndarray, times: int
    ) -> Callable[[], float]:
        """A function that multiplies ``x [T, K]`` with the experts `ids` [T, k]; it gives the seconds."""
        rows, columns = matrix.shape
        tokens, top_k = ids.shape
        stored = self._quantize(kind, matrix)

        class Parameters(ctypes.Structure):
            _fields_ = [("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]

        size = experts * len(stored) + times * (4 * rows * top_k * tokens + 4096) + (512 << 20)
        context = ctypes.c_void_p(self._base.ggml_init(Parameters(size, None, False)))
        extent = ctypes.c_int64
        new_3d, new_2d = self._base.ggml_new_tensor_3d, self._base.ggml_new_tensor_2d
        a = ctypes.c_void_p(new_3d(context, kind, extent(columns), extent(rows), extent(experts)))
        b = ctypes.c_void_p(new_3d(context, F32, extent(columns), extent(1), extent(tokens)))
        i = ctypes.c_void_p(new_2d(context, I32, extent(top_k), extent(tokens)))
        self._fill(a, np.tile(stored, experts))
        self._fill(b, np.ascontiguousarray(x))
        self._fill(i, np.ascontiguousarray(ids, np.int32))
        graph = ctypes.c_void_p(self._base.ggml_new_graph(context))
        for _ in range(times):
            node = ctypes.c_void_p(self._base.ggml_mul_mat_id(context, a, b, i))
            self._base.ggml_build_forward_expand(graph, node)

        def run() -> float:
            start = time.perf_counter()
            status = self._cpu.ggml_graph_compute_with_ctx(context, graph, self._threads)
            if status:
                raise RuntimeError(f"ggml: status {status}")
            return (time.perf_counter() - start) / times

        return run

    def _quantize(self, kind: int, matrix: np.ndarray) -> np.ndarray:
        rows, columns = matrix.shape
        target = np.empty(2 * matrix.nbytes, np.uint8)
        importance = np.ones(columns, np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (matrix, target, importance)]
        extents = [ctypes.c_int64(value) for value in (0, rows, columns)]
        size = self._base.ggml_quantize_chunk(kind, pointers[0], pointers[1], *extents, pointers[2])
        return target[:size]

    def _fill(self, tensor: ctypes.c_void_p, array: np.ndarray) -> None:
        ctypes.memmove(self._base.ggml_get_data(tensor), array.ctypes.data, array.nbytes)


def moqc_product(
    fmt: Any, rows: int, columns: int, experts: int, ids: np.ndarray, x: np.ndarray
) -> Callable[[], float]:
    """The same for moqc: route, quantize the activations, multiply."""
    import tvm
    from tvm import relax, tirx

    from moqc.ir.packed import packed_types
    from moqc.schedules.cpu.families import FAMILIES
    from moqc.schedules.cpu.lower import _activation_types, _emit
    from moqc.schedules.cpu.packed_experts import ExpertsShape, gate_up_kernel
    from moqc.schedules.cpu.plan import find_plans
    from moqc.schedules.cpu.quantize_activations import activations_kernel
    from moqc.schedules.cpu.route import lower_route
    from moqc.targets import find_target

    target, top_k = find_target("native"), ids.shape[1]
    family = FAMILIES[target.dot]
    shape = ExpertsShape(
        experts,
        top_k,
        inputs=columns,
        hidden=columns,
        intermediate=rows,
        gate=(),
        up=(fmt,),
        down=(fmt,),
        activation="relu2",
        mode="int8",
    )
    plans = find_plans(target, "gate_up", shape.sizes, shape.formats("gate_up"))
    tokens = tirx.Var("t", "int64")
    types = packed_types(fmt, rows, columns, (experts,))
    parameters = {
        "x": relax.TensorType([tokens, columns], "float32"),
        "ids": relax.TensorType([tokens, top_k], "int64"),
        "table": relax.TensorType([3, experts, 2], "int32"),
        **types,
    }
    variables = {name: relax.Var(name, ty) for name, ty in parameters.items()}
    bb = relax.BlockBuilder()
    with bb.function("product", list(variables.values())):
        with bb.dataflow():
            order, starts, active = lower_route(bb, variables["ids"], experts)
            pairs = tokens * top_k
            gather = activations_kernel(family, columns, mode="int8", top_k=top_k)
            inputs = _emit(
                bb,
                gather,
                "gather",
                [variables["x"], order],
                _activation_types(family, pairs, columns, "int8"),
            )
            weights = [variables[name] for name in types]
            outputs = [([pairs, shape.padded_intermediate], "float32")]
            arguments = [*inputs, starts, active, variables["table"], *weights]
            (result,) = _emit(bb, gate_up_kernel(family, shape, plans), "up", arguments, outputs)
            result = bb.emit_output(result)
        bb.emit_func_output(result)
    machine = relax.VirtualMachine(tvm.compile(bb.get(), tvm.target.Target(target.tvm)), tvm.cpu())
    function = machine["product"]
    random = np.random.default_rng(0)
    table = np.zeros((3, experts, 2), np.int32)
    table[..., 1] = np.arange(experts)
    arrays: list[Any] = [x, ids.astype(np.int64), table]
    for ty in types.values():
        extents = [int(extent) for extent in ty.shape]
        if str(ty.dtype) == "float16":
            arrays.append(random.uniform(0.001, 0.02, extents).astype(np.float16))
        else:
            arrays.append(np.frombuffer(random.bytes(int(np.prod(extents))), np.uint8).reshape(extents))
    tensors = [tvm.runtime.tensor(array) for array in arrays]

    def run() -> float:
        start = time.perf_counter()
        function(*tensors)
        return time.perf_counter() - start

    return run


def median_us(run: Callable[[], float]) -> float:
    run()
    end, times = time.perf_counter() + SECONDS, []
    while time.perf_counter() < end or len(times) < 3:
        times.append(run())
    return statistics.median(times) * 1e6


def measure(side: str, options: argparse.Namespace) -> dict[str, float]:
    """Microseconds by provider of one side."""
    use_threads(options.threads)
    from moqc.bench.shapes import find_shape
    from moqc.quant.formats import Format

    shape, random = find_shape(options.shape), np.random.default_rng(0)
    tokens = options.tokens
    matrix = random.standard_normal((shape.intermediate, shape.hidden), np.float32)
    ids = np.stack([random.permutation(shape.experts)[: shape.top_k] for _ in range(tokens)])
    x = random.standard_normal((tokens, shape.hidden), np.float32)
    if side == "moqc":
        size = (shape.intermediate, shape.hidden, shape.experts)
        return {
            f"moqc {name}": median_us(moqc_product(Format.parse(name), *size, ids, x))
            for name in options.formats.split(",")
        }
    ggml, times = Ggml(options.threads), 20 if tokens == 1 else 1
    return {
        f"llama.cpp {name}": median_us(ggml.product(GGML_TYPES[name], matrix, shape.experts, ids, x, times))
        for name in options.types.split(",")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--types", default="Q4_K,Q4_0,Q8_0,Q2_K,IQ2_XS")
    parser.add_argument("--formats", default=FORMATS, help="default: what the compiler chooses from")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["llama.cpp", "moqc"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    times: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for side in ("llama.cpp", "moqc"):
            command = [sys.executable, *sys.argv, "--side", side]
            # Threads that sleep between operators cost llama.cpp whole ticks of the scheduler.
            environment = {**os.environ, "OMP_WAIT_POLICY": "active"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            for name, us in json.loads(done.stdout.splitlines()[-1]).items():
                times.setdefault(name, []).append(us)
    medians = {name: statistics.median(values) for name, values in times.items()}
    best = min(us for name, us in medians.items() if name.startswith("llama"))
    facts = {"shape": options.shape, "tokens": options.tokens, "threads": options.threads}
    for name, us in medians.items():
        ratio = {"us": round(us, 1), "of_best_llama_cpp": round(us / best, 3)}
        print(json.dumps({"provider": name, **facts, **ratio}))


if __name__ == "__main__":
    main()
