"""What MetaSchedule finds as the engine of `moqc tune`: ``python benchmarks/metaschedule_search.py``.

A function whose schedule samples the numbers of a `PanelPlan` stands in for the kernel, which the builder
would make of them; no kernel is timed. A plan's cost is made up (the best one 1, each doubling of a number
away from it more), so what is compared is how good the plans are that 16 trials find, and what the engine
itself takes. Results are in docs/decisions.md.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.ir.utils import derived_object
from tvm.s_tir import meta_schedule as ms
from tvm.s_tir.meta_schedule.builder import BuilderResult, PyBuilder
from tvm.s_tir.meta_schedule.runner import PyRunner, PyRunnerFuture, RunnerResult
from tvm.s_tir.stmt import SBlock
from tvm.script import tirx as T

from moqc.bench.search import Search, Space
from moqc.schedules.cpu.plan import PanelPlan
from moqc.schedules.cpu.space import SPACE, draw, neighbours

TRIALS, SEEDS = 16, 50
BEST = {"tasks": (4, 0.05), "batch": (8, 0.2), "many": (4, 0.1), "ahead": (64, 0.03)}
"""Field -> its best number, and what each doubling away from that costs."""

FOUND: list[float] = []
"""Costs of the plans that MetaSchedule asked for."""


def cost(plan: PanelPlan) -> float:
    return 1 + sum(
        weight * abs(math.log2(getattr(plan, name) / best)) for name, (best, weight) in BEST.items()
    )


@T.prim_func(s_tir=True)
def main_function(a: T.Buffer((16,), "float32"), b: T.Buffer((16,), "float32")) -> None:
    for i in range(16):
        with T.sblock("copy"):
            v = T.axis.spatial(16, i)
            b[v] = a[v]


def schedule(sch: Any) -> None:
    """Samples each number, and notes it where the builder finds it."""
    for name, values in SPACE[PanelPlan].items():
        chosen = sch.sample_categorical(list(values), [1 / len(values)] * len(values))
        sch.annotate(sch.get_sblock("copy"), f"plan.{name}", chosen)


def plan_of(mod: tvm.IRModule) -> PanelPlan:
    found: dict[str, int] = {}

    def visit(block: SBlock) -> None:
        found.update({str(name)[5:]: int(value) for name, value in (block.annotations or {}).items()})

    tvm_ffi.structural_walk(mod["main"].body, [(SBlock, visit)])
    return PanelPlan(**{name: found[name] for name in BEST})


@derived_object
class Builder(PyBuilder):
    def build(self, inputs: list[Any]) -> list[BuilderResult]:
        paths = [Path(tempfile.mkdtemp(), str(plan_of(each.mod))) for each in inputs]
        for path in paths:
            path.touch()  # MetaSchedule removes it
        return [BuilderResult(str(path), None) for path in paths]


@derived_object
class Measured(PyRunnerFuture):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def done(self) -> bool:
        return True

    def result(self) -> RunnerResult:
        return RunnerResult([self.seconds], None)


@derived_object
class Runner(PyRunner):
    def run(self, inputs: list[Any]) -> list[Measured]:
        costs = [cost(PanelPlan.parse(Path(str(each.artifact_path)).name)) for each in inputs]
        FOUND.extend(costs)
        return [Measured(each / 1e3) for each in costs]


def by_metaschedule(strategy: str) -> float:
    """The best cost of a strategy's plans."""
    FOUND.clear()
    space = ms.space_generator.ScheduleFn(schedule, sch_rules=[], postprocs=[], mutator_probs={})
    target = tvm.target.Target({"kind": "llvm", "mcpu": "sapphirerapids", "num-cores": 2})
    options = {"strategy": strategy, "cost_model": "random", "builder": Builder(), "runner": Runner()}
    with tempfile.TemporaryDirectory() as folder:
        ms.tune_tir(
            main_function,
            target,
            folder,
            max_trials_global=TRIALS,
            num_trials_per_iter=4,
            space=space,
            **options,
        )
    return min(FOUND)


def by_search(seed: int) -> float:
    """The same of `moqc.bench.search`."""
    search = Search(Space(PanelPlan(), neighbours, partial(draw, PanelPlan)), seed)
    for _ in range(TRIALS):
        plan = search.propose()
        search.report(plan, cost(plan) / cost(PanelPlan()))
    return cost(search.best)


def main() -> None:
    logging.disable(logging.INFO)
    print(f"default: {cost(PanelPlan()):.3f}")
    for strategy in ("replay-trace", "evolutionary"):
        begin, cpu = time.perf_counter(), time.process_time()
        found = [by_metaschedule(strategy) for _ in range(4)]
        took = f"{time.perf_counter() - begin:.1f} s, {time.process_time() - cpu:.1f} s of CPU"
        print(f"{strategy}: {statistics.mean(found):.3f} of 4 runs, {took}")
    ours = [by_search(seed) for seed in range(SEEDS)]
    generator = random.Random(0)
    drawn = [min(cost(draw(PanelPlan, generator)) for _ in range(TRIALS)) for _ in range(SEEDS)]
    means = f"{statistics.mean(ours):.3f}; drawn at random: {statistics.mean(drawn):.3f}"
    print(f"moqc's search: {means} ({SEEDS} runs each)")


if __name__ == "__main__":
    main()
