"""Search the plans of the decode kernels on a GPU: ``python benchmarks/tune_plans.py OUT.json [SHAPE...]``.

For each shape, case and 1 and 8 tokens, gate_up and down apart, the plan of the rules, the recorded one,
plans drawn from its neighbourhood and from all of `moqc.schedules.cuda.space` are compiled by nvcc and timed
by themselves (`workload.graph_us`). The winner becomes a record, with the time of the rules' plan beside it.
Needs nvcc, CuPy and a GPU; of TVM the runtime alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import cupy
import torch
from cases import CASES, experts_shape
from weights import Weights
from workload import SHAPES, Shape, copy_of, graph_us, rotation, routing

import moqc.schedules.cuda as package
from moqc.quant.pack_mma import COLUMNS
from moqc.schedules.cuda.plan import ExpertsShape, down_rule, gate_up_rule
from moqc.schedules.cuda.records import find
from moqc.schedules.cuda.rows import RowsPlan
from moqc.schedules.cuda.space import down_space, gate_up_space, rows_space, sample
from moqc.schedules.cuda.templates import (
    SOURCES,
    AnyPlan,
    down_groups,
    down_of,
    gate_up_groups,
    gate_up_of,
)

TUNED = {
    **{f"w{bits}-g64-asym": (bits, False, True) for bits in (4, 3, 2)},
    **{f"w{bits}{zeros}": (bits, False, bool(zeros)) for bits in (4, 3, 2, 1) for zeros in ("", "-asym")},
    **{f"w{bits}-s8": (bits, False, False) for bits in (3, 2, 1)},
    "w4-asym-s8": (4, False, True),
    "mixed": (4, True, False),
    "mixed-global": (4, True, True),
}
"""Case -> the widest code, whether there are several formats, and zeros: what records go by."""
TRIALS = {False: 3, True: 1}
"""Plans drawn of each space for a single format, and for several, whose kernels take long to compile."""
MARGIN = 0.98
"""A plan has to be faster than the rules' by this factor."""
MILLISECONDS = 3.0
LISTS = "const void* slots, const void* shares, const void* members, const void* hit"
DECLARED = {
    "gate_up": f"const X* x, const void* factors, int tokens, int top, {LISTS}, const int* table, "
    "const void* gate_bias, const void* up_bias, void* hidden, void* shifts, float* y",
    "down": f"const void* hidden, const void* shifts, int tokens, {LISTS}, int top, const int* table, "
    "const void* bias, float* y",
}


@dataclass(frozen=True)
class Kernel:
    """One plan to be tried."""

    kind: str
    shape: ExpertsShape
    plan: AnyPlan

    @property
    def slots(self) -> int:
        return self.shape.slots(self.plan.tokens)

    @property
    def blocks(self) -> int:
        if self.kind == "gate_up":
            return self.slots * gate_up_groups(self.shape, self.plan)
        return self._slices * down_groups(self.shape, self.plan)

    @property
    def _slices(self) -> int:
        if isinstance(self.plan, RowsPlan):
            return self.slots * (-(-self.shape.intermediate // COLUMNS) // self.plan.units)
        return -(-self.slots * -(-self.shape.intermediate // COLUMNS) // self.plan.warps)

    def function(self) -> tuple[str, int]:
        """The device function and its shared memory."""
        ids = "int64" if self.plan.tokens == 1 else "int32"
        if self.kind == "gate_up":
            return gate_up_of(self.shape, self.plan, ids)
        return down_of(self.shape, self.plan, ids, adds=self.plan.tokens > 1 or self._slices > 1)

    def source(self, name: str) -> str:
        """A kernel called `name`."""
        lists = (self.shape.gate, self.shape.up) if self.kind == "gate_up" else (self.shape.down,)
        packed = [f"p{number}" for number in range(3 * sum(map(len, lists)))]
        x = "float" if self.plan.tokens == 1 else "unsigned char"  # halves, as the layer makes them
        declared = DECLARED[self.kind].replace("const X*", f"const {x}*")
        declared += "".join(f", const char* {each}" for each in packed)
        given = [each.split()[-1].lstrip("*") for each in declared.split(", ")]
        head = f'extern "C" __global__ void __launch_bounds__({32 * self.plan.warps}) {name}({declared})'
        body = f"extern __shared__ char memory[];\n  {self.function()[0]}(memory, {', '.join(given)});"
        return f"{head} {{\n  {body}\n}}\n"


def candidates(kind: str, shape: ExpertsShape, tokens: int) -> list[Kernel]:
    """The plan of the rules first, then the recorded one and some of both spaces."""
    rule, space = (gate_up_rule, gate_up_space) if kind == "gate_up" else (down_rule, down_space)
    count = TRIALS[len(set((*shape.gate, *shape.up, *shape.down))) > 1]
    rows = sample(rows_space(kind, shape, tokens), count) if tokens > 1 else []
    plans = [rule(shape, tokens), find(kind, shape, tokens), *sample(space(shape, tokens), count), *rows]
    return [Kernel(kind, shape, plan) for plan in dict.fromkeys(plans) if plan is not None]


def compile_kernels(binary: Path, kernels: list[Kernel]) -> None:
    """The kernels, called k0 and so on, in one file."""
    source = binary.with_suffix(".cu")
    texts = [Path(package.__path__[0], name).read_text() for name in SOURCES]
    source.write_text("\n".join(texts) + "".join(each.source(f"k{at}") for at, each in enumerate(kernels)))
    command = ["nvcc", "-std=c++17", "-O3", "-cubin", "-gencode=arch=compute_90a,code=sm_90a"]
    subprocess.run([*command, "-o", str(binary), str(source)], check=True, capture_output=True)


Found = dict[tuple[int, str], tuple[Path, list[Kernel]]]
"""Tokens and kind -> the binary, and what it has."""


class Calls:
    """The routed calls of a shape and case at 1 or 8 tokens, as the kernels want them."""

    def __init__(self, shape: Shape, copies: list[Weights], tokens: int) -> None:
        count, used = rotation(shape, tokens, copies[0].expert_bytes)
        used, self.tokens = min(used, len(copies)), tokens
        self.slots = shape.top_k if tokens == 1 else min(tokens * shape.top_k, shape.experts)
        self.copies = [copies[copy_of(shape, tokens, number, used)] for number in range(count)]
        self.lists = [self._list(*routing(shape, tokens, number)) for number in range(count)]
        units = -(-shape.intermediate // COLUMNS)
        self.x = torch.randn(tokens, shape.hidden, device="cuda")
        if tokens > 1:
            self.x = torch.nn.functional.pad(self.x, (0, -shape.hidden % COLUMNS)).half()
        self.factors = torch.ones(tokens, device="cuda")
        self.hidden = torch.randn(self.slots, tokens, units * COLUMNS, device="cuda").half()
        self.shifts = torch.zeros(self.slots, tokens, 16 * units, dtype=torch.uint8, device="cuda")
        self.y = torch.zeros(tokens, shape.hidden, device="cuda")

    def _list(self, ids: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
        if self.tokens == 1:
            nothing = torch.zeros(1, dtype=torch.int32, device="cuda")
            return [ids[0].long().cuda(), weights[0].cuda(), nothing, nothing]
        experts = sorted(set(ids.flatten().tolist()))
        slots = torch.zeros(self.slots, dtype=torch.int32)
        members, shares = torch.full((self.slots, 8), -1, dtype=torch.int32), torch.zeros(self.slots, 8)
        for slot, expert in enumerate(experts):
            slots[slot] = expert
            for token, chosen in zip(*torch.where(ids == expert), strict=True):
                members[slot, token], shares[slot, token] = token, weights[token, chosen]
        hit = torch.tensor([len(experts)], dtype=torch.int32)
        return [each.cuda() for each in (slots, shares, members, hit)]

    def arguments(self, kind: str, top_k: int, at: int) -> list[Any]:
        """What the kernels are given in call `at`."""
        weights, lists = self.copies[at], [each.data_ptr() for each in self.lists[at]]
        table, y, tokens = weights.table.data_ptr(), self.y.data_ptr(), cupy.int32(self.tokens)
        packed = []
        for name in ("gate", "up") if kind == "gate_up" else ("down",):
            for each in weights.classes[name]:
                pointers = [tensor.data_ptr() for tensor in each.tensors]
                packed += (pointers + pointers[:1])[:3]
        hidden = [self.hidden.data_ptr(), self.shifts.data_ptr()]
        if kind == "gate_up":
            given = [self.x.data_ptr(), self.factors.data_ptr()]
            return [*given, tokens, cupy.int32(top_k), *lists, table, table, table, *hidden, y, *packed]
        return [*hidden, tokens, *lists, cupy.int32(top_k), table, table, y, *packed]


def timed(kernel: Kernel, function: Any, calls: Calls) -> float:
    """Microseconds of one launch."""
    shared = kernel.function()[1]
    if shared > 48 * 1024:
        function.max_dynamic_shared_size_bytes = shared
    arguments = [calls.arguments(kernel.kind, kernel.shape.top_k, at) for at in range(len(calls.lists))]

    def run(at: int) -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            threads = 32 * kernel.plan.warps
            function((kernel.blocks,), (threads,), tuple(arguments[at]), shared_mem=shared)

    return graph_us([lambda at=at: run(at) for at in range(len(arguments))], MILLISECONDS)


def search(binary: Path, kernels: list[Kernel], calls: Calls) -> dict[str, Any]:
    """The fastest of `kernels`, and what the first, the rules', took."""
    module = cupy.RawModule(path=str(binary))
    times = [timed(each, module.get_function(f"k{at}"), calls) for at, each in enumerate(kernels)]
    best = min(range(len(times)), key=times.__getitem__)
    best = best if times[best] < MARGIN * times[0] else 0
    return {
        "plan": str(kernels[best].plan),
        "microseconds": round(times[best], 2),
        "rule": str(kernels[0].plan),
        "rule_microseconds": round(times[0], 2),
        "tried": len(times),
    }


def tune(name: str, case: str, found: Found) -> list[Any]:
    """The records of one shape and case."""
    formats = [list(each) for each in CASES[case]]
    one = Weights.random(SHAPES[name], formats)
    count = max(rotation(SHAPES[name], tokens, one.expert_bytes)[1] for tokens in (1, 8))
    copies = [one, *(Weights.random(SHAPES[name], formats) for _ in range(count - 1))]
    records = []
    for (tokens, kind), (binary, kernels) in found.items():
        shape, (bits, several, zeros) = kernels[0].shape, TUNED[case]
        facts = {"kernel": kind, "tokens": tokens, "experts": shape.experts, "top_k": shape.top_k}
        facts |= {"hidden": shape.hidden, "intermediate": shape.intermediate}
        facts |= {"bits": bits, "several": several, "zeros": zeros}
        facts |= {} if several else {"format": str(shape.up[0])}
        records.append(facts | search(binary, kernels, Calls(SHAPES[name], copies, tokens)))
        print(name, case, records[-1], flush=True)
    return records


def main() -> None:
    out, names = Path(sys.argv[1]), sys.argv[2:] or list(SHAPES)
    begin = time.time()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        found: dict[tuple[str, str], Found] = {}
        for name, case, tokens, kind in product(names, TUNED, (1, 8), ("gate_up", "down")):
            path = Path(folder, f"{name}_{case}_{tokens}_{kind}.cubin")
            kernels = candidates(kind, experts_shape(name, case), tokens)
            found.setdefault((name, case), {})[tokens, kind] = path, kernels
        jobs = [job for each in found.values() for job in each.values()]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda job: compile_kernels(*job), jobs))
        count = sum(len(kernels) for _, kernels in jobs)
        print(f"{count} kernels compiled in {time.time() - begin:.0f} s", flush=True)
        records: list[Any] = []
        for (name, case), each in found.items():
            records += tune(name, case, each)
            out.write_text(json.dumps(records, indent=1))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
