"""Search the plans of the experts kernels on this machine; what was found becomes records.

Every trial compiles one library with the next plan of each search (gate_up and down, for one token and for
many) and times it in turns with the library of the default plans: machines change their speed, ratios do not.
A search tries the neighbours of its best plan, and plans drawn at random where they are all tried. What it
found is timed once more, checked against the reference, and recorded if it is faster.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

import moqc
from moqc.bench.kernels import COLD_BYTES, parse_classes
from moqc.bench.layer import Layer
from moqc.bench.shapes import Shape, find_shape
from moqc.certificate import TOLERANCES
from moqc.describe import versions
from moqc.errors import InternalError, TargetError, UserError
from moqc.keywords import keywords
from moqc.log import event, logger, track
from moqc.options import TuneOptions
from moqc.quant.formats import Format
from moqc.schedules import plan_records as records
from moqc.schedules.cpu.lower import lower_mixed_experts
from moqc.schedules.cpu.plan import KERNELS, TUNED, Plan, Plans
from moqc.schedules.cpu.space import draw, neighbours
from moqc.targets import Target, find_target, missing_features

MARGIN = 0.98
"""A plan has to be faster than the default by this factor."""
SECONDS = {"few": 0.4, "many": 0.8}
"""Time of the calls of a trial."""
FINAL = 3
"""How much longer the last comparison takes."""

Name = tuple[str, str]
"""A kernel and a part of its plans."""
Row = dict[str, Any]


class Search:
    """The plans of one kernel for one number of tokens: the best so far, by its time over the default's."""

    def __init__(self, default: Plan, seed: int = 0) -> None:
        self.best, self.ratio = default, 1.0
        self._tried, self._random = {default}, random.Random(seed)

    def propose(self) -> Plan:
        """The next plan: a neighbour of the best, or any."""
        near = [plan for plan in neighbours(self.best) if plan not in self._tried]
        plan = near[0] if near else draw(type(self.best), self._random)
        self._tried.add(plan)
        return plan

    def report(self, plan: Plan, ratio: float) -> None:
        """Take note of its time over the default's."""
        if ratio < self.ratio:
            self.best, self.ratio = plan, ratio

    @property
    def tried(self) -> int:
        """Number of plans."""
        return len(self._tried)


@keywords(TuneOptions)
def tune(out: Path, options: TuneOptions) -> list[Row]:
    """Search for every shape and entry of `bits`; `out` is written after each, and continued if it is there.

    Raises UserError for unknown names and a file of another machine, TargetError where this machine cannot
    run the target.
    """
    target = find_target(options.target)
    if target.schedules != "cpu":
        raise TargetError(
            f"{target.name}: tune searches the plans of CPU kernels; those of CUDA are found by "
            "benchmarks/tune_plans.py on the GPU"
        )
    if missing := missing_features(target):
        raise TargetError(f"{target.name}: this machine lacks {', '.join(missing)}; tune on one that has it")
    if options.trials < 1:
        raise UserError(f"trials {options.trials}: must be at least 1")
    tasks = [
        (name, find_shape(name), parse_classes(bits)) for name in options.shapes for bits in options.bits
    ]
    source = f"{_machine()}: moqc tune --target {target.name}"
    rows = _known(out, source)
    for name, shape, formats in track(tasks, "tuning"):
        if any(_about(row, shape, formats) for row in rows):
            continue
        found = _tune(target, shape, formats, options.trials)
        for row in found:
            gain = row["rule_microseconds"] / row["microseconds"]
            about = f"{name} {'/'.join(map(str, formats))} {row['kernel']} {row['tokens']}"
            event("tuned", f"{about}: {row['plan']} {gain:.2f}x", **row)
        rows += found
        _write(out, {"schema": records.SCHEMA, "source": source, "records": rows})
    return rows


def _machine() -> str:
    """CPU, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
    used, threads = versions(), tvm.get_global_func("runtime.NumThreads")()
    return f"{name}, {threads} threads, moqc {moqc.__version__}, TVM {used.tvm}, LLVM {used.llvm}"


def _known(out: Path, source: str) -> list[Row]:
    """The rows of an earlier run. Raises UserError for those of another machine."""
    if not out.exists():
        return []
    found = records.read(out)
    if found.source != source:
        raise UserError(f"{out}: records of {found.source}; this is {source}: give another file")
    return [dict(row) for row in found.rows]


def _write(out: Path, content: Row) -> None:
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(out)


def _facts(shape: Shape, formats: Sequence[Format]) -> Row:
    """The fields of a record that say what it is for, without kernel and tokens."""
    sizes = (shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    facts = dict(zip(records.KEY, records.record_key("", 0, sizes, formats), strict=True))
    return {**facts, "format": str(formats[0])} if len(set(formats)) == 1 else facts


def _about(row: Row, shape: Shape, formats: Sequence[Format]) -> bool:
    facts = _facts(shape, formats)
    return all(row.get(name) == facts.get(name) for name in (*records.KEY[2:], "format"))


def _tune(target: Target, shape: Shape, formats: Sequence[Format], trials: int) -> list[Row]:
    """The records of one shape."""
    bench = _Bench(Layer(target, shape, formats, COLD_BYTES))
    searches = {(kernel, part): Search(getattr(Plans(), part)) for kernel in KERNELS for part in TUNED}
    for _ in range(trials):
        tried = {name: search.propose() for name, search in searches.items()}
        times = bench.compare(tried)
        for name, plan in tried.items():
            ratio = times[name][0] / times[name][1]
            logger.debug(f"{' '.join(name)} {plan}: {ratio:.3f} of {1e6 * times[name][1]:.1f} us")
            searches[name].report(plan, ratio)
    best = {name: search.best for name, search in searches.items()}
    times = bench.compare(best, FINAL)
    chosen = {
        name: plan if times[name][0] < MARGIN * times[name][1] else getattr(Plans(), name[1])
        for name, plan in best.items()
    }
    bench.check(chosen)
    rows = []
    for (kernel, part), plan in chosen.items():
        us, default = times[kernel, part]
        rule = getattr(Plans(), part)
        rows.append(
            {
                **_facts(shape, formats),
                **{"kernel": kernel, "tokens": TUNED[part], "plan": str(plan)},
                "microseconds": round(1e6 * (default if plan == rule else us), 2),
                **{"rule": str(rule), "rule_microseconds": round(1e6 * default, 2)},
                "tried": searches[kernel, part].tried,
            }
        )
    return rows


class _Bench:
    """Times plans in turns with the default ones on one layer."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._default = self._machine({})

    def compare(self, plans: Mapping[Name, Plan], effort: float = 1.0) -> dict[Name, tuple[float, float]]:
        """Median seconds of each kernel with `plans`, and with the default ones."""
        machines = (self._machine(plans), self._default)
        found: dict[Name, tuple[float, float]] = {}
        for part, tokens in TUNED.items():
            times = self._times(machines, tokens, effort * SECONDS[part])
            for kernel in KERNELS:
                one, other = (statistics.median(each[f"moqc_{kernel}"]) for each in times)
                found[kernel, part] = one, other
        return found

    def check(self, plans: Mapping[Name, Plan]) -> None:
        """Compare the kernels of `plans` with the reference. Raises InternalError over the tolerance."""
        layer, machine = self._layer, self._machine(plans)
        for tokens in (1, 37):
            x, ids, shares = layer.inputs(tokens)
            ids = np.broadcast_to(ids[:1], ids.shape).copy()
            ids[tokens // 2 :, 0] = -1  # the first expert has fewer tokens than the others
            arrays = [tvm.runtime.tensor(each) for each in (x, ids, shares)]
            result = torch.from_numpy(machine["block"](*arrays, *layer.sets[0]).numpy())
            expected = layer.expected(x, ids, shares)
            error = float((result - expected).norm() / expected.norm())
            if not error <= TOLERANCES["int8"]:
                raise InternalError(
                    f"plans {', '.join(map(str, plans.values()))} on {layer.shape}: relative error "
                    f"{error:.1e} against the reference; nothing was recorded"
                )

    def _machine(self, plans: Mapping[Name, Plan]) -> Any:
        """The block compiled with `plans` in place of the default ones."""
        chosen = {kernel: Plans() for kernel in KERNELS}
        for (kernel, part), plan in plans.items():
            chosen[kernel] = chosen[kernel].with_part(part, plan)
        return self._layer.compile(partial(lower_mixed_experts, plans=chosen))

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
