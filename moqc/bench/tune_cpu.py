"""Plans of the CPU kernels, timed on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

import moqc
from moqc.bench.kernels import COLD_BYTES
from moqc.bench.layer import Layer
from moqc.bench.search import Name, Plans, Space
from moqc.bench.shapes import Shape
from moqc.certificate import TOLERANCES
from moqc.describe import versions
from moqc.errors import TargetError
from moqc.quant.formats import Format
from moqc.schedules.cpu.lower import lower_mixed_experts
from moqc.schedules.cpu.plan import KERNELS, TUNED, default_plans
from moqc.schedules.cpu.space import draw, neighbours
from moqc.targets import Target, missing_features

SECONDS = {1: 0.4, 32: 0.6, 512: 0.8}
"""Number of tokens -> time of the calls of a trial."""
CHECKED = (1, 37)
"""Tokens of the calls that are compared with the reference."""


def cpu_machine(target: Target) -> str:
    """CPU, threads and versions. Raises TargetError where this machine cannot run the target."""
    if missing := missing_features(target):
        raise TargetError(f"{target.name}: this machine lacks {', '.join(missing)}; tune on one that has it")
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    used, threads = versions(), tvm.get_global_func("runtime.NumThreads")()
    return f"{name}, {threads} threads, moqc {moqc.__version__}, TVM {used.tvm}, LLVM {used.llvm}"


class CpuLayer:
    """A `TunedLayer`: one library has the kernels of a trial; they and the default ones take turns."""

    def __init__(self, target: Target, shape: Shape, formats: Sequence[Format]) -> None:
        self._layer = Layer(target, shape, formats, COLD_BYTES)
        self._rules = default_plans(target.vector_lanes, formats)
        self._machines: dict[frozenset[Any], Any] = {}

    def spaces(self) -> dict[Name, Space]:
        """See `TunedLayer`."""
        plans = {tokens: getattr(self._rules, part) for part, tokens in TUNED.items()}
        return {
            (kernel, tokens): Space(plan, neighbours, partial(draw, type(plan)))
            for kernel in KERNELS
            for tokens, plan in plans.items()
        }

    def compare(self, plans: Plans, effort: float = 1.0) -> dict[Name, tuple[float, float]]:
        """See `TunedLayer`."""
        machines = (self._machine(plans), self._machine({}))
        found: dict[Name, tuple[float, float]] = {}
        for tokens in TUNED.values():
            times = self._times(machines, tokens, effort * SECONDS[tokens])
            for kernel in KERNELS:
                one, other = (statistics.median(each[f"moqc_{kernel}"]) for each in times)
                found[kernel, tokens] = one, other
        return found

    def error(self, plans: Plans) -> tuple[float, float]:
        """See `TunedLayer`."""
        layer, machine, errors = self._layer, self._machine(plans), []
        for tokens in CHECKED:
            x, ids, shares = layer.inputs(tokens)
            ids = np.broadcast_to(ids[:1], ids.shape).copy()
            ids[tokens // 2 :, 0] = -1  # the first expert has fewer tokens than the others
            arrays = [tvm.runtime.tensor(each) for each in (x, ids, shares)]
            result = torch.from_numpy(machine["block"](*arrays, *layer.sets[0]).numpy())
            expected = layer.expected(x, ids, shares)
            errors.append(float((result - expected).norm() / expected.norm()))
        return max(errors), TOLERANCES[layer.target.activations[0]]

    def _machine(self, plans: Plans) -> Any:
        """The block compiled with `plans` in place of the default ones, once."""
        rules = {name: space.default for name, space in self.spaces().items()}
        key = frozenset({name: str(plan) for name, plan in plans.items() if plan != rules[name]}.items())
        if key not in self._machines:
            chosen, parts = dict.fromkeys(KERNELS, self._rules), {n: part for part, n in TUNED.items()}
            for (kernel, tokens), plan in plans.items():
                chosen[kernel] = chosen[kernel].with_part(parts[tokens], plan)
            self._machines[key] = self._layer.compile(partial(lower_mixed_experts, plans=chosen))
        return self._machines[key]

    def _times(self, machines: Sequence[Any], tokens: int, seconds: float) -> list[dict[str, list[float]]]:
        """Seconds of each kernel's calls, by the function's name, for each machine; machines take turns."""
        layer, times = self._layer, [_Times() for _ in machines]
        x, _, shares = (tvm.runtime.tensor(each) for each in layer.inputs(tokens))
        calls = layer.calls(tokens)
        for machine, own in zip(machines, times, strict=True):
            machine["block"](x, next(calls)[0], shares, *layer.sets[0])
            machine.set_instrument(own)
        end = time.perf_counter() + seconds
        turn = 0
        while time.perf_counter() < end or turn < 3:
            turn += 1
            for machine in machines if turn % 2 else machines[::-1]:
                ids, _, weights = next(calls)
                machine["block"](x, ids, shares, *weights)
        return [own.seconds for own in times]


class _Times:
    """TVM's virtual machine calls this before and after each function."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._start = 0.0

    def __call__(self, _function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> None:
        if before:
            self._start = time.perf_counter()
        else:
            self.seconds.setdefault(name, []).append(time.perf_counter() - self._start)
