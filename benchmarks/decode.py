"""Check and time the decode kernels on a GPU: ``python benchmarks/decode.py LIBRARIES OUT.json``.

LIBRARIES is a folder of ``decode_kernels.py``'s outputs. Values are compared with the dequantized float32
reference on the first and last row tiles of both products; then every kernel, and the best few pairs as whole
layers, are timed (`workload.graph_us`). A layer is gate_up + down, with the list of experts hit made
beforehand (as for other providers); ``routed_us`` makes it on the device too.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm
import tvm_ffi
from workload import SHAPES, Shape, copy_of, graph_us, relative_error, rotation, routing

from moqc.quant.formats import Format
from moqc.quant.pack_mma import PackedUnits, packed_shapes, unpack_units

SAMPLE = 2
"""Row tiles compared at each end of a matrix."""
PROJECTIONS = ("gate", "up", "down")


@dataclass
class Class:
    """One bit class of a projection: packed tensors on the GPU, stacked over its experts."""

    format: Format
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None

    @classmethod
    def random(cls, fmt: Format, count: int, rows: int, columns: int) -> Class:
        codes_shape, groups_shape = packed_shapes(fmt, rows, columns)
        codes = torch.randint(0, 256, (count, *codes_shape), dtype=torch.uint8, device="cuda")
        # The same size of weights at every width.
        scales = (torch.rand(count, *groups_shape, device="cuda") * 0.02 + 0.005) * (8 / fmt.levels)
        zeros = None
        if not fmt.symmetric:
            zeros = torch.randint(0, 256, (count, *groups_shape), dtype=torch.uint8, device="cuda")
        return cls(fmt, codes, scales.half(), zeros)

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for tensor in (self.codes, self.scales, self.zeros) if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)

    def dequantize(self, index: int, tiles: list[int], columns: int) -> torch.Tensor:
        """Row tiles `tiles` of matrix `index`, float32."""
        codes, scales = (tensor[index, tiles].cpu().numpy() for tensor in (self.codes, self.scales))
        zeros = None if self.zeros is None else self.zeros[index, tiles].cpu().numpy()
        packed = PackedUnits(np.ascontiguousarray(codes), scales, zeros)
        return unpack_units(packed, self.format, 16 * len(tiles), columns).dequantize().cuda()


@dataclass
class Weights:
    """One copy of a layer."""

    shape: Shape
    classes: dict[str, list[Class]]
    table: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, formats: list[list[str]]) -> Weights:
        table = torch.zeros(3, shape.experts, 2, dtype=torch.int32)
        classes: dict[str, list[Class]] = {}
        for number, (projection, names) in enumerate(zip(PROJECTIONS, formats, strict=True)):
            rows, columns = shape.intermediate, shape.hidden
            if projection == "down":
                rows, columns = columns, rows
            classes[projection] = []
            for at, name in enumerate(names):
                members = list(range(at, shape.experts, len(names)))
                classes[projection].append(Class.random(Format.parse(name), len(members), rows, columns))
                for index, expert in enumerate(members):
                    table[number, expert] = torch.tensor([at, index])
        return cls(shape, classes, table.cuda())

    def operands(self, *projections: str) -> list[torch.Tensor]:
        return [tensor for name in projections for each in self.classes[name] for tensor in each.tensors]

    @property
    def expert_bytes(self) -> float:
        total = sum(each.nbytes for classes in self.classes.values() for each in classes)
        return total / self.shape.experts

    def dequantize(self, projection: str, expert: int, tiles: list[int]) -> torch.Tensor:
        at, index = self.table[PROJECTIONS.index(projection), expert].tolist()
        columns = self.shape.intermediate if projection == "down" else self.shape.hidden
        return self.classes[projection][at].dequantize(index, tiles, columns)


@dataclass
class Call:
    """One call's routing, as the kernels take it."""

    ids: torch.Tensor
    weights: torch.Tensor
    slots: torch.Tensor
    shares: torch.Tensor
    hit: torch.Tensor
    experts: list[int]

    @classmethod
    def of(cls, shape: Shape, tokens: int, number: int) -> Call:
        ids, weights = routing(shape, tokens, number)
        if tokens == 1:
            experts = ids[0].tolist()
            slots, shares = ids[0].clone(), weights.reshape(-1, 1)
        else:
            experts = sorted(set(ids.flatten().tolist()))
            capacity = min(shape.experts, 8 * shape.top_k)
            slots, shares = torch.zeros(capacity, dtype=torch.int32), torch.zeros(capacity, 8)
            for at, expert in enumerate(experts):
                slots[at] = expert
                token, chosen = torch.where(ids == expert)
                shares[at, token] = weights[token, chosen]
        hit = torch.tensor([len(experts)], dtype=torch.int32)
        return cls(*(tensor.cuda() for tensor in (ids, weights, slots, shares, hit)), experts)


class Problem:
    """One shape, case and number of tokens: calls, buffers and the reference."""

    def __init__(self, shape: Shape, copies: list[Weights], tokens: int) -> None:
        self.shape, self.tokens = shape, tokens
        calls, count = rotation(shape, tokens, copies[0].expert_bytes)
        self.calls = [Call.of(shape, tokens, number) for number in range(calls)]
        count = min(count, len(copies))
        self.weights = [copies[copy_of(shape, tokens, number, count)] for number in range(calls)]
        self.hit = sum(len(call.experts) for call in self.calls) / calls
        columns = 1 if tokens == 1 else 8
        slots = len(self.calls[0].slots)
        self.x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.float16)
        self.hidden = torch.zeros(slots, columns, shape.intermediate, dtype=torch.float16, device="cuda")
        self.y = torch.zeros(tokens, shape.hidden, device="cuda")

    def gate_up(self, function: Any, call: Call, weights: Weights) -> None:
        hit = [call.hit] if self.tokens > 1 else []
        operands = weights.operands("gate", "up")
        with tvm_ffi.use_torch_stream():
            function(self.x, call.slots, call.shares, *hit, weights.table, *operands, self.hidden, self.y)

    def down(self, function: Any, call: Call, weights: Weights) -> None:
        hit = [call.hit] if self.tokens > 1 else []
        with tvm_ffi.use_torch_stream():
            function(self.hidden, call.slots, *hit, weights.table, *weights.operands("down"), self.y)

    def route(self, function: Any, call: Call) -> None:
        with tvm_ffi.use_torch_stream():
            function(call.ids, call.weights, call.slots, call.shares, call.hit)

    def expected_hidden(self, rows: list[int]) -> torch.Tensor:
        """The first call's hidden tensor, at row tiles `rows`."""
        call, weights, x = self.calls[0], self.weights[0], self.x.float()
        out = []
        for slot, expert in enumerate(call.experts):
            gate, up = (x @ weights.dequantize(name, expert, rows).T for name in ("gate", "up"))
            shares = call.shares.view(len(call.slots), -1)[slot, : self.tokens, None]
            out.append(shares * torch.nn.functional.silu(gate) * up)
        return torch.stack(out)

    def expected_y(self, rows: list[int]) -> torch.Tensor:
        """y at row tiles `rows`, from the hidden tensor as it is."""
        call, weights = self.calls[0], self.weights[0]
        y = torch.zeros(self.tokens, 16 * len(rows), device="cuda")
        for slot, expert in enumerate(call.experts):
            hidden = self.hidden[slot, : self.tokens].float()
            y += hidden @ weights.dequantize("down", expert, rows).T
        return y

    def time(self, function: Callable[[Call, Weights], None], milliseconds: float = 5.0) -> float:
        pairs = zip(self.calls, self.weights, strict=True)
        return graph_us([lambda c=c, w=w: function(c, w) for c, w in pairs], milliseconds)


def sampled(rows: int) -> tuple[list[int], torch.Tensor]:
    """Row tiles to compare, and their rows."""
    tiles = rows // 16
    numbers = [*range(SAMPLE), *range(tiles - SAMPLE, tiles)]
    return numbers, torch.cat([torch.arange(16 * n, 16 * n + 16) for n in numbers]).cuda()


class Bench:
    """The libraries, and the rows measured so far."""

    def __init__(self, folder: Path) -> None:
        library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.entries: list[dict[str, Any]] = []
        self.modules, self.rows, self.begin = [], [], time.time()
        self.cases: dict[str, Any] = {}
        for path in sorted(folder.glob("*.so")):
            self.modules.append(tvm.runtime.load_module(str(path)))
            listed = json.loads(path.with_suffix(".json").read_text())
            self.entries += listed["kernels"]
            self.cases |= listed["cases"]

    def function(self, name: str) -> Any:
        for module in self.modules:
            if module.implements_function(name):
                return module[name]
        raise LookupError(name)

    def row(self, **values: Any) -> None:
        self.rows.append(values)
        text = " ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{v}" for k, v in values.items())
        print(f"[{time.time() - self.begin:5.1f}] {text}", flush=True)

    def kernels(
        self, problem: Problem, entries: list[dict[str, Any]], label: dict[str, Any]
    ) -> dict[str, list[Any]]:
        """Check and time every kernel; (µs, error, entry) by kind, fastest first."""
        shape, found = problem.shape, {"gate_up": [], "down": []}
        tiles, rows = sampled(shape.intermediate)
        slots = len(problem.calls[0].experts)
        expected = problem.expected_hidden(tiles)
        first = problem.calls[0], problem.weights[0]
        for entry in (entry for entry in entries if entry["kind"] == "gate_up"):
            function = self.function(entry["name"])
            problem.hidden.fill_(float("nan"))
            problem.y.fill_(float("nan"))
            problem.gate_up(function, *first)
            error = relative_error(problem.hidden[:slots, : problem.tokens][:, :, rows], expected)
            cleared = bool((problem.y == 0).all())
            us = problem.time(lambda c, w, f=function: problem.gate_up(f, c, w))
            found["gate_up"].append((us, error if cleared else float("nan"), entry))
        tiles, rows = sampled(shape.hidden)
        problem.gate_up(self.function(found["gate_up"][0][2]["name"]), *first)
        expected = problem.expected_y(tiles)
        for entry in (entry for entry in entries if entry["kind"] == "down"):
            function = self.function(entry["name"])
            problem.y.zero_()
            problem.down(function, *first)
            error = relative_error(problem.y[:, rows], expected)
            us = problem.time(lambda c, w, f=function: problem.down(f, c, w))
            found["down"].append((us, error, entry))
        for kind, results in found.items():
            results.sort(key=lambda result: result[0])
            text = " | ".join(f"{plan_text(e['plan'])} {us:.2f}" for us, _, e in results[:6])
            worst = max(error for _, error, _ in results)
            print(f"    {label} {kind}: {text} worst error {worst:.1e}", flush=True)
        return found

    def case(self, shape_name: str, case: str) -> None:
        """Every number of tokens of one shape and case."""
        shape = SHAPES[shape_name]
        mine = [e for e in self.entries if e["shape"] == shape_name and e["case"] == case]
        one = Weights.random(shape, self.cases[case])
        copies = [one] + [
            Weights.random(shape, self.cases[case]) for _ in range(max_copies(shape, one.expert_bytes) - 1)
        ]
        for tokens in sorted({entry["plan"]["tokens"] for entry in mine}):
            problem = Problem(shape, copies, tokens)
            entries = [entry for entry in mine if entry["plan"]["tokens"] == tokens]
            label = {"shape": shape_name, "bits": case, "tokens": tokens}
            found = self.kernels(problem, entries, label)
            errors = [error for results in found.values() for _, error, _ in results]
            self.layers(problem, found, {**label, "error": max(errors)}, one.expert_bytes)

    def layers(
        self, problem: Problem, found: dict[str, list[Any]], label: dict[str, Any], size: float
    ) -> None:
        """Whole layers: the fastest pair of the best few kernels of each kind."""
        timed = []
        for _, _, up in found["gate_up"][:2]:
            for _, _, down in found["down"][:3]:
                f, g = self.function(up["name"]), self.function(down["name"])

                def layer(call: Call, weights: Weights, f: Any = f, g: Any = g) -> None:
                    problem.gate_up(f, call, weights)
                    problem.down(g, call, weights)

                timed.append((problem.time(layer, 8.0), up, down, layer))
        us, up, down, layer = min(timed, key=lambda item: item[0])
        gate_up_us = next(t for t, _, e in found["gate_up"] if e is up)
        down_us = next(t for t, _, e in found["down"] if e is down)
        routed = None
        if problem.tokens > 1:
            route = self.function("route_" + label["shape"].replace("-", "_"))

            def whole(call: Call, weights: Weights) -> None:
                problem.route(route, call)
                layer(call, weights)

            routed = problem.time(whole, 8.0)
        self.row(
            provider="moqc", **label, us=us, gate_up_us=gate_up_us, down_us=down_us, routed_us=routed,
            hit_bytes=size * problem.hit, plans=[plan_text(up["plan"]), plan_text(down["plan"])],
        )  # fmt: skip


def plan_text(plan: dict[str, int]) -> str:
    kind = "r" if plan["registers"] else "s"
    return f"w{plan['warps']}t{plan['tiles']}{kind}{plan['stages']}m{plan['tokens']}i{plan['items']}"


def max_copies(shape: Shape, expert_bytes: float) -> int:
    return max(rotation(shape, tokens, expert_bytes)[1] for tokens in (1, 8))


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.manual_seed(0)
    bench = Bench(folder)
    for case in bench.cases:
        for shape in SHAPES:
            if any(e["case"] == case and e["shape"] == shape for e in bench.entries):
                bench.case(shape, case)
                torch.cuda.empty_cache()
                out.write_text(json.dumps(bench.rows, indent=1))


if __name__ == "__main__":
    main()
