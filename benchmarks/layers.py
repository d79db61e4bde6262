"""Check and time whole MoE layers on a GPU: ``python benchmarks/layers.py LIBRARIES OUT.json [TOKENS...]``.

LIBRARIES is a folder of ``layer_kernels.py``'s outputs, of several variants of plans if there are. A layer is
one call of its function, from the router's ids and weights to y, lists of experts included. y of the first
call is compared with the dequantized float32 reference; then a graph of many calls is timed
(`workload.graph_us`).
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tvm
import tvm_ffi
from cases import tokens_of
from weights import Weights
from workload import SHAPES, copy_of, graph_us, rotation, routing

from moqc.schedules.cuda.plan import ExpertsShape
from moqc.schedules.cuda.workspace import workspace_bytes

CHECKED = 1
"""Tokens of a call that are compared, at most."""


class Problem:
    """One shape, case and number of tokens: calls, buffers and the reference."""

    def __init__(self, shape_name: str, copies: list[Weights], tokens: int) -> None:
        shape = SHAPES[shape_name]
        calls, count = rotation(shape, tokens, copies[0].expert_bytes)
        calls, count = (calls, min(count, len(copies))) if tokens < 512 else (2, 1)
        routed = [routing(shape, tokens, number) for number in range(calls)]
        self.routed = [(ids.long().cuda(), weights.cuda()) for ids, weights in routed]
        self.copies = [copies[copy_of(shape, tokens, number, count)] for number in range(calls)]
        self.hit = sum(len(ids.unique()) for ids, _ in self.routed) / calls
        self.x = torch.randn(tokens, shape.hidden, device="cuda")
        layer = ExpertsShape(shape.experts, shape.top_k, shape.hidden, shape.intermediate, (), (), ())
        self.workspace = torch.empty(workspace_bytes(layer, tokens), dtype=torch.uint8, device="cuda")
        self.y = torch.empty(tokens, shape.hidden, device="cuda")

    def run(self, function: Any, call: int) -> None:
        ids, weights = self.routed[call]
        copy = self.copies[call]
        with tvm_ffi.use_torch_stream():
            function(
                self.x, ids, weights, copy.table, *copy.operands("gate", "up", "down"), self.workspace, self.y
            )

    def error(self, function: Any) -> float:
        """The largest relative error of the tokens compared of the first call."""
        self.workspace.fill_(255)
        self.y.fill_(float("nan"))
        self.run(function, 0)
        ids, weights = self.routed[0]
        some = torch.arange(0, len(ids), max(1, len(ids) // CHECKED), device="cuda")
        expected = torch.zeros(len(some), self.x.shape[1], device="cuda")
        for expert in ids[some].unique().tolist():
            token, chosen = torch.where(ids[some] == expert)
            gate, up, down = (self.copies[0].whole(name, expert) for name in ("gate", "up", "down"))
            x = self.x[some][token]
            value = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
            expected.index_add_(0, token, value * weights[some][token, chosen][:, None])
        wrong = (self.y[some] - expected).norm(dim=1) / expected.norm(dim=1)
        return float(wrong.nan_to_num(1e9).max())

    def time(self, function: Any) -> float:
        return graph_us([lambda at=at: self.run(function, at) for at in range(len(self.routed))], 12.0)


def load(folder: Path) -> tuple[dict[str, Any], dict[str, list[list[str]]], list[dict[str, str]]]:
    """Functions by name, formats by case, and the functions' facts."""
    library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    functions: dict[str, Any] = {}
    cases: dict[str, list[list[str]]] = {}
    listed: list[dict[str, str]] = []
    for path in sorted(folder.glob("*.json")):
        facts = json.loads(path.read_text())
        module = tvm.runtime.load_module(str(path.with_suffix(".so")))
        cases |= facts["cases"]
        listed += facts["functions"]
        functions |= {each["name"]: module[each["name"]] for each in facts["functions"]}
    return functions, cases, listed


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    chosen = list(map(int, sys.argv[3:]))
    torch.manual_seed(0)
    functions, cases, listed = load(folder)
    rows, begin = [], time.time()
    for shape_name, shape in SHAPES.items():
        for case in cases:
            mine = [each for each in listed if each["shape"] == shape_name and each["case"] == case]
            if not mine:
                continue
            tokens_list = chosen or tokens_of(case)
            one = Weights.random(shape, cases[case])
            count = max(
                rotation(shape, t, one.expert_bytes)[1]
                for t in tokens_list
                if t < 512 or t == min(tokens_list)
            )
            copies = [one, *(Weights.random(shape, cases[case]) for _ in range(count - 1))]
            for tokens in tokens_list:
                problem = Problem(shape_name, copies, tokens)
                for each in mine:
                    function = functions[each["name"]]
                    error, us = problem.error(function), problem.time(function)
                    rows.append(
                        {
                            "provider": "moqc", "shape": shape_name, "bits": case, "tokens": tokens, "us": us,
                            "error": error, "variant": each["variant"],
                            "hit_bytes": problem.hit * one.expert_bytes, "expert_bytes": one.expert_bytes,
                        }
                    )  # fmt: skip
                    flop = 6 * tokens * shape.top_k * shape.hidden * shape.intermediate
                    rates = (
                        f"{problem.hit * one.expert_bytes / us / 1e6:.2f} TB/s, {flop / us / 1e6:.0f} TFLOP/s"
                    )
                    what = f"{shape_name} {case} {tokens} {each['variant']}"
                    print(
                        f"[{time.time() - begin:5.1f}] {what}: {us:.1f} us, {rates}, error {error:.1e}",
                        flush=True,
                    )
                out.write_text(json.dumps(rows, indent=1))
            del copies, one
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
