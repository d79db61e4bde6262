"""MLC-style TIR at one token, as MLC-LLM decodes MoE layers: ``python benchmarks/mlc_experts.py OUT.json``.

Its recipe: codes in uint32 words along a row, float16 scales for groups of 32 (3 bits: 40), a PrimFunc that
dequantizes and multiplies, scheduled by dlight's GEMV rule; gate and up are one product. float16 activations.
silu * up and the weighted sum are torch's, compiled. For more tokens MLC-LLM has another kernel, which took 1
to 1,200 ms on these layers (docs/benchmarks-h200.md) and is not timed here. Needs TVM's compiler and nvcc.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import tvm
import tvm_ffi
from tvm.s_tir import dlight
from tvm.script import tirx as T
from workload import SHAPES, Shape, copy_of, graph_us, rotation, routing

from moqc.schedules.cuda import toolchain

GROUPS = {4: 32, 3: 40}
"""Bits -> columns of a group; 3 bits: ten codes a word."""


def gemv(experts: int, chosen: int, rows: int, columns: int, bits: int, shared: bool) -> Any:
    """o[e, rows] = W[ids[e]] x; `shared`: all experts read the same x."""
    each, group = 32 // bits, GROUPS[bits]
    groups = -(-columns // group)
    words, inputs = groups * (group // each), 1 if shared else chosen
    mask, middle = (1 << bits) - 1, (1 << (bits - 1)) - 1

    @T.prim_func(private=True, s_tir=True)
    def function(
        x: T.Buffer((inputs, columns), "float16"),
        w: T.Buffer((experts, rows, words), "uint32"),
        scales: T.Buffer((experts, rows, groups), "float16"),
        ids: T.Buffer((1, chosen), "int32"),
        o: T.Buffer((chosen, rows), "float16"),
    ):
        T.func_attr({"tirx.noalias": True})
        for number in T.thread_binding(chosen, thread="blockIdx.y"):
            with T.sblock("expert"):
                e = T.axis.spatial(chosen, number)
                y = T.sblock_alloc_buffer((rows, columns), "float16")
                for row, column in T.grid(rows, columns):
                    with T.sblock("dequantize"):
                        i, j = T.axis.remap("SS", [row, column])
                        y[i, j] = (
                            T.Cast(
                                "float16",
                                T.bitwise_and(
                                    T.shift_right(
                                        w[ids[0, e], i, j // each], T.Cast("uint32", j % each * bits)
                                    ),
                                    T.uint32(mask),
                                ),
                            )
                            - T.float16(middle)
                        ) * scales[ids[0, e], i, j // group]
                for row, column in T.grid(rows, columns):
                    with T.sblock("gemv"):
                        i, j = T.axis.remap("SR", [row, column])
                        with T.init():
                            o[e, i] = T.float16(0)
                        o[e, i] += x[T.if_then_else(shared, 0, e), j] * y[i, j]

    return function


def sizes(shape: Shape) -> list[tuple[int, int, bool]]:
    """Rows, columns and whether x is shared, of both products."""
    return [(2 * shape.intermediate, shape.hidden, True), (shape.hidden, shape.intermediate, False)]


def build(bits: int, shape: Shape) -> list[Any]:
    """Both products of a layer."""
    target = tvm.target.Target({"kind": "cuda", "arch": "sm_90", "max_threads_per_block": 1024}, host="llvm")
    functions = {
        f"product_{number}": gemv(shape.experts, shape.top_k, rows, columns, bits, shared).with_attr(
            "global_symbol", f"product_{number}"
        )
        for number, (rows, columns, shared) in enumerate(sizes(shape))
    }
    with target:
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.GEMV())(tvm.IRModule(functions))
        library = tvm.compile(mod, target=target)
    return [library[name] for name in functions]


def random_weights(shape: Shape, bits: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Codes and scales of both products."""
    found = []
    for rows, columns, _ in sizes(shape):
        groups = -(-columns // GROUPS[bits])
        words = groups * (GROUPS[bits] // (32 // bits))
        codes = torch.randint(0, 2**31 - 1, (shape.experts, rows, words), dtype=torch.int32, device="cuda")
        scales = torch.rand(shape.experts, rows, groups, dtype=torch.float16, device="cuda") * 0.02
        found.append((codes.view(torch.uint32), scales))
    return found


def time_layer(shape: Shape, bits: int, products: list[Any]) -> dict[str, float]:
    """Microseconds of a layer at one token, and the bytes of the experts hit."""
    first = random_weights(shape, bits)
    size = sum(each.numel() * each.element_size() for pair in first for each in pair) / shape.experts
    calls, count = rotation(shape, 1, size)
    copies = [first, *(random_weights(shape, bits) for _ in range(count - 1))]
    routed = [[each.cuda() for each in routing(shape, 1, number)] for number in range(calls)]
    make = {"dtype": torch.float16, "device": "cuda"}
    x, both = torch.randn(1, shape.hidden, **make), torch.zeros(shape.top_k, 2 * shape.intermediate, **make)
    out = torch.zeros(shape.top_k, shape.hidden, **make)

    @torch.compile(dynamic=False)
    def gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    @torch.compile(dynamic=False)
    def weighted(out: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (out * weights[0][:, None]).sum(0)

    def run(call: int) -> None:
        (ids, weights), copy = routed[call], copies[copy_of(shape, 1, call, count)]
        with tvm_ffi.use_torch_stream():
            products[0](x, *copy[0], ids, both)
            products[1](gated(both), *copy[1], ids, out)
        weighted(out, weights)

    us = graph_us([lambda at=at: run(at) for at in range(calls)], 12.0)
    return {"us": us, "hit_bytes": shape.top_k * size}


def main() -> None:
    toolchain.prepare(["sm_90"])
    rows = []
    for name in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"):
        for bits in GROUPS:
            row = {"provider": "mlc-tir", "shape": name, "bits": f"w{bits}", "tokens": 1}
            rows.append(row | time_layer(SHAPES[name], bits, build(bits, SHAPES[name])))
            print(rows[-1], flush=True)
            Path(sys.argv[1]).write_text(json.dumps(rows, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
