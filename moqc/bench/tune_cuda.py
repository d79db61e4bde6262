"""Plans of the CUDA decode kernels, timed on this machine's GPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
import tvm

import moqc
from moqc.bench.layer import RandomLayer
from moqc.bench.search import Name, Plans, Space
from moqc.bench.shapes import Shape
from moqc.describe import versions
from moqc.errors import TargetError
from moqc.ir.ops import PROJECTIONS
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS
from moqc.runtime.cuda import Stream, absent_gpu, load_cuda
from moqc.schedules.cuda import toolchain
from moqc.schedules.cuda.experts import down_kernel, gate_up_kernel, route_kernel
from moqc.schedules.cuda.plan import COLUMN_TOKENS, ExpertsShape
from moqc.schedules.cuda.quads import QuadsPlan
from moqc.schedules.cuda.quads_layer import quads_kernel
from moqc.schedules.cuda.rules import schedule_for_gpu
from moqc.schedules.cuda.space import plan_space
from moqc.schedules.cuda.templates import AnyPlan
from moqc.targets import Target

COLD_BYTES = 420_000_000
"""Bytes of experts that calls read between two uses of the same ones: several second-level caches."""
CALLS = 96
"""Of a graph, at most."""
TURNS = 5
"""Replays of a graph in a trial, at least."""
SECONDS = 0.01
"""Of the replays of a kernel in a trial."""
TOLERANCE = 5e-3
"""Largest relative error (Frobenius) allowed: activations are float16."""
TOKENS = (1, COLUMN_TOKENS)


def cuda_machine(target: Target) -> str:
    """GPU and versions. Raises TargetError where there is none that the target is for."""
    if why := absent_gpu():
        raise TargetError(
            f"{target.name}: plans are searched on the GPU itself, and {why}: run `moqc tune` where it is, "
            "and compile anywhere with its --records"
        )
    if len(target.architectures) > 1:
        raise TargetError(f"{target.name}: name one architecture, that of this machine's GPU")
    device, nvcc = load_cuda(tvm, target.architectures), toolchain.nvcc_version()
    return f"{device.device_name}, nvcc {nvcc}, moqc {moqc.__version__}, TVM {versions().tvm}"


class CudaLayer:
    """A `TunedLayer`: each kernel is timed by itself, in a graph of calls whose weights are in no cache."""

    def __init__(self, target: Target, shape: Shape, formats: Sequence[Format]) -> None:
        self._device = load_cuda(tvm, target.architectures)
        self._stream, self._target = Stream(self._device), target
        toolchain.prepare(target.architectures)
        self._layer = RandomLayer(target, shape, formats, COLD_BYTES, self._device)
        sizes = (shape.experts, shape.top_k, shape.hidden, shape.intermediate)
        self._shape = ExpertsShape(*sizes, *(self._layer.formats,) * 3, shape.activation)
        self._route = self._build({"route": route_kernel(self._shape, "int64")})["route"]
        self._spaces = _spaces(self._shape, int(target.tvm["max_shared_memory_per_block"]))
        self._calls = {tokens: self._arguments(tokens) for tokens in TOKENS}
        self._default = self._graphs({name: space.default for name, space in self._spaces.items()})

    def spaces(self) -> dict[Name, Space]:
        """See `TunedLayer`."""
        return self._spaces

    def compare(self, plans: Plans, effort: float = 1.0) -> dict[Name, tuple[float, float]]:
        """See `TunedLayer`."""
        found = {}
        for name, graph in self._graphs(plans).items():
            pair, calls = (graph, self._default[name]), len(self._calls[name[1]])
            for each in pair:
                self._seconds(each)  # warms up
            times: list[list[float]] = [[], []]
            while len(times[0]) < TURNS or sum(map(sum, times)) < effort * SECONDS:
                for each, own in zip(pair, times, strict=True):
                    own.append(self._seconds(each))
            one, other = (statistics.median(own) / calls for own in times)
            found[name] = one, other
        return found

    def error(self, plans: Plans) -> tuple[float, float]:
        """See `TunedLayer`."""
        functions, errors = self._kernels(plans), []
        for tokens in TOKENS:
            x, ids, shares = self._layer.inputs(tokens)
            ids[tokens // 2 :, 0] = ids[0, 0]  # an expert with several tokens
            call = self._call(x, self._layer.put(ids), shares, self._layer.sets[0])
            functions["gate_up", tokens](*call["gate_up"])
            functions["down", tokens](*call["down"])
            self._stream.synchronize()
            result = torch.from_numpy(call["down"][-1].numpy())
            expected = self._layer.expected(x, ids, shares)
            errors.append(float(((result - expected).norm() / expected.norm()).nan_to_num(1e9)))
        return max(errors), TOLERANCE

    def _graphs(self, plans: Plans) -> dict[Name, Any]:
        """For each kernel the graph of all calls."""
        graphs = {}
        for (kernel, tokens), function in self._kernels(plans).items():
            calls = [call[kernel] for call in self._calls[tokens]]

            def run(function: Any = function, calls: Sequence[Any] = calls) -> Any:
                for arguments in calls:
                    function(*arguments)
                return function

            run()  # loads the code, which a graph must not
            self._stream.synchronize()
            graphs[kernel, tokens] = self._stream.capture(run)
        return graphs

    def _seconds(self, graph: Any) -> float:
        self._stream.synchronize()
        start = time.perf_counter()
        graph[0].launch()
        self._stream.synchronize()
        return time.perf_counter() - start

    def _kernels(self, plans: Plans) -> dict[Name, Any]:
        """The kernels with these plans, compiled together."""
        functions = {}
        for (kernel, tokens), plan in plans.items():
            ids = "int64" if tokens == 1 else "int32"
            if isinstance(plan, QuadsPlan):
                function = quads_kernel(kernel, self._shape, plan, "float32", "int64")
            elif kernel == "gate_up":
                function = gate_up_kernel(self._shape, plan, "float32" if tokens == 1 else "uint8", ids)
            else:
                function = down_kernel(self._shape, plan, ids)
            functions[f"{kernel}_{tokens}"] = function
        library = self._build(functions)
        return {(kernel, tokens): library[f"{kernel}_{tokens}"] for kernel, tokens in plans}

    def _build(self, functions: Mapping[str, Any]) -> Any:
        """Compile PrimFuncs by name."""
        target = tvm.target.Target(self._target.tvm)
        named = {name: each.with_attr("global_symbol", name) for name, each in functions.items()}
        with target:
            mod = schedule_for_gpu(tvm.IRModule(named), self._target.warp_groups)
            return tvm.compile(mod, target=target)

    def _arguments(self, tokens: int) -> list[dict[str, list[Any]]]:
        """The calls of a graph."""
        x, _, shares = self._layer.inputs(tokens)
        hit = self._shape.slots(tokens) / self._shape.experts  # of the weights, a call
        count = min(CALLS, max(4, round(len(self._layer.sets) / hit)))
        return [
            self._call(x, ids, shares, weights)
            for ids, _, weights in islice(self._layer.calls(tokens), count)
        ]

    def _call(self, x: Any, ids: Any, shares: Any, weights: Sequence[Any]) -> dict[str, list[Any]]:
        """What the kernels are given, as a layer gives it to them."""
        put, shape, tokens = self._layer.put, self._shape, len(x)
        slots, columns, units = shape.slots(tokens), tokens, -(-shape.intermediate // COLUMNS)
        if tokens == 1:
            inputs = [put(x)]
            lists = [put(ids.numpy()[0]), put(shares.T.copy())]
        elif isinstance(self._spaces["gate_up", tokens].default, QuadsPlan):
            inputs, lists = [put(x)], [ids, put(shares)]
            slots, columns = tokens, shape.top_k  # what is hidden lies by the router's pairs
        else:
            halves = np.pad(x.astype(np.float16), ((0, 0), (0, -shape.hidden % COLUMNS)))
            inputs = [put(halves.view(np.uint8)), put(np.ones(tokens, np.float32))]
            extents = {"int32": ((slots,), (slots, COLUMN_TOKENS)), "float32": ((slots, COLUMN_TOKENS),)}
            named, members, part = (
                put(np.zeros(extent, dtype)) for dtype, each in extents.items() for extent in each
            )
            count = put(np.zeros(1, np.int32))
            self._route(ids, put(shares), named, members, part, count)
            lists = [named, part, members, count]
        table, packed = weights[0], dict(zip(self._layer.types, weights, strict=True))
        of = {each: [packed[key] for key in packed if key.startswith(f"{each}.")] for each in PROJECTIONS}
        hidden = put(np.zeros((slots, columns, shape.intermediate), np.float16))
        shifts = put(np.zeros((slots, columns, 16 * units), np.uint8))
        y = put(np.zeros((tokens, shape.hidden), np.float32))
        return {
            "gate_up": [*inputs, *lists, table, *of["gate"], *of["up"], hidden, shifts, y],
            "down": [hidden, shifts, *lists, table, *of["down"], y],
        }


def _spaces(shape: ExpertsShape, shared: int) -> dict[Name, Space]:
    """What each kernel of a layer may try, with `shared` bytes of shared memory a block."""
    found = {}
    for tokens in TOKENS:
        for kernel in ("gate_up", "down"):
            default, plans = plan_space(kernel, shape, tokens, shared)
            found[kernel, tokens] = Space(default, partial(_near, plans), partial(_any, plans))
    return found


def _near(plans: Sequence[AnyPlan], plan: AnyPlan) -> list[AnyPlan]:
    """Those of `plans` that differ from `plan` in one number."""
    return [each for each in plans if type(each) is type(plan) and _differences(each, plan) == 1]


def _differences(one: AnyPlan, other: AnyPlan) -> int:
    return sum(getattr(one, name) != getattr(other, name) for name in one.__dataclass_fields__)


def _any(plans: Sequence[AnyPlan], generator: random.Random) -> AnyPlan:
    return generator.choice(plans)
