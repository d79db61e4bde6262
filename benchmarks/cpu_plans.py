"""Time plans of CPU kernels on a machine without TVM's compiler.

    python benchmarks/cpu_plans.py build OUT TARGET:SHAPE:BITS:PART ... [--plans PLAN,...]
    TVM_NUM_THREADS=2 python benchmarks/cpu_plans.py run OUT RESULTS.json [--seconds S]
    python benchmarks/cpu_plans.py records TARGET RESULTS.json ... --source TEXT

`build` compiles, here, the experts block of a shape with the default plans and with each plan of a part
(``few``, ``several``, ``many``) for both kernels; `run` times them in turns, there, with TVM's runtime alone,
and writes after each block; `records` adds what was faster in the median and the least time of every run
to ``schedules/records/TARGET.json``. `moqc tune` is the search; this is for machines lent for a minute.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

COLD_BYTES = 320 << 20
TOKENS = {"few": (1,), "several": (8, 32, 128), "many": (512,)}


def build(out: Path, blocks: list[str], plans: list[str]) -> None:
    """One folder a block: a library a plan, and what its operands are."""
    from functools import partial

    from moqc.bench.kernels import parse_classes
    from moqc.bench.layer import Layer
    from moqc.bench.shapes import find_shape
    from moqc.schedules.cpu.lower import lower_mixed_experts
    from moqc.schedules.cpu.plan import KERNELS, default_plans
    from moqc.targets import find_target

    class Described(Layer):
        """Without weights: they are made where they are timed."""

        def _weights(self) -> list[Any]:
            return []

    for block in blocks:
        target, shape, bits, part = block.split(":")
        folder = out / block.replace(":", "_").replace("/", "+")
        folder.mkdir(parents=True, exist_ok=True)
        layer = Described(find_target(target), find_shape(shape), parse_classes(bits), 1)
        rules = default_plans(layer.target.vector_lanes, layer.formats)
        default = getattr(rules, part)
        names = [str(default), *(plan for plan in plans if plan != str(default))]
        for name in names:
            chosen = rules.with_part(part, type(default).parse(name))
            if not (folder / f"{name}.so").exists():
                lower = partial(lower_mixed_experts, plans=dict.fromkeys(KERNELS, chosen))
                layer.build(lower).export_library(str(folder / f"{name}.so"))
        operands = {name: ([int(e) for e in ty.shape], str(ty.dtype)) for name, ty in layer.types.items()}
        sizes = {name: getattr(layer.shape, name) for name in ("experts", "top_k", "hidden", "intermediate")}
        facts = {"block": block, "plans": names, "operands": operands, "classes": len(layer.formats), **sizes}
        (folder / "block.json").write_text(json.dumps(facts))
        print(block, len(names), flush=True)


def operand(generator: np.random.Generator, name: str, extents: list[int], dtype: str, facts: Any) -> Any:
    """Random weights; the table deals experts to classes in turn."""
    if name == "table":
        expert = np.arange(facts["experts"])
        place = np.stack([expert % facts["classes"], expert // facts["classes"]], axis=-1)
        return np.broadcast_to(place, extents).astype(np.int32)
    if name.endswith("scales"):
        scales = generator.uniform(0.001, 0.02, extents).astype(np.float16)
        return (scales.view(np.uint16) >> 8).astype(np.uint8) if dtype == "uint8" else scales
    return np.frombuffer(generator.bytes(int(np.prod(extents))), np.uint8).reshape(extents)


class Times:
    """TVM's virtual machine calls this before and after each function."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, _function: Any, name: str, before: bool, _result: Any, *_arguments: Any) -> None:
        if before:
            self._start = time.perf_counter()
        else:
            self.seconds.setdefault(name, []).append(time.perf_counter() - self._start)


def time_block(folder: Path, seconds: float) -> list[dict[str, Any]]:
    """Rows of one block: for each kernel and number of tokens the median and least seconds of each plan."""
    import tvm
    from tvm.runtime.vm import VirtualMachine

    facts, generator = json.loads((folder / "block.json").read_text()), np.random.default_rng(0)
    put = tvm.runtime.tensor
    libraries = {name: tvm.runtime.load_module(str(folder / f"{name}.so")) for name in facts["plans"]}
    machines = {name: VirtualMachine(library, tvm.cpu()) for name, library in libraries.items()}
    arrays = [operand(generator, name, *each, facts) for name, each in facts["operands"].items()]
    count = max(1, -(-COLD_BYTES // sum(array.nbytes for array in arrays)))
    sets = [[put(array) for array in arrays] for _ in range(count)]
    rows, experts, top = [], facts["experts"], facts["top_k"]
    for tokens in TOKENS[facts["block"].split(":")[3]]:
        x = put(generator.standard_normal((tokens, facts["hidden"]), np.float32))
        shares = put(generator.random((tokens, top), np.float32))
        order = generator.permuted(np.tile(np.arange(experts), (tokens, 1)), axis=1)
        turns = max(1, experts // (tokens * top))
        routed = [put(np.ascontiguousarray(np.roll(order, -turn * top, 1)[:, :top])) for turn in range(turns)]
        times, first, errors = {name: Times() for name in machines}, None, {}
        for name, machine in machines.items():
            y = machine["block"](x, routed[0], shares, *sets[0]).numpy()
            first = y if first is None else first
            errors[name] = float(np.linalg.norm(y - first) / np.linalg.norm(first))
            machine.set_instrument(times[name])
        end, turn = time.perf_counter() + seconds, 0
        while time.perf_counter() < end or turn < 3:
            for name in list(machines)[:: 1 if turn % 2 else -1]:
                machines[name]["block"](x, routed[turn // count % turns], shares, *sets[turn % count])
            turn += 1
        for machine in machines.values():
            machine.set_instrument(lambda *_: None)
        for kernel in ("gate_up", "down"):
            own = {name: each.seconds[f"moqc_{kernel}"] for name, each in times.items()}
            found = {name: [1e6 * statistics.median(each), 1e6 * min(each)] for name, each in own.items()}
            facts_ = {"block": facts["block"], "tokens": tokens, "kernel": kernel, "turns": turn}
            rows.append({**facts_, "us": found, "errors": errors})
            rule = found[facts["plans"][0]]
            ratios = " ".join(
                f"{name} {rule[0] / us[0]:.2f}/{rule[1] / us[1]:.2f}" for name, us in found.items()
            )
            print(
                f"{facts['block']} {kernel:7} {tokens:3}: {rule[0]:9.1f} us | {ratios} n={turn}", flush=True
            )
    return rows


def record(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of a kernel: the plan that was faster in every run, in the median and the least time."""
    from moqc.bench.kernels import parse_classes
    from moqc.bench.shapes import find_shape
    from moqc.bench.tune import MARGIN, _facts

    _, shape, bits, _ = runs[0]["block"].split(":")
    rule, *others = runs[0]["us"]

    def ratio(plan: str) -> float:
        return max(each["us"][plan][at] / each["us"][rule][at] for each in runs for at in (0, 1))

    def mean(plan: str) -> float:
        return round(statistics.mean(each["us"][plan][0] for each in runs), 2)

    plan = min([plan for plan in others if ratio(plan) < MARGIN], key=mean, default=rule)
    return {
        **_facts(find_shape(shape), parse_classes(bits)),
        **{
            "kernel": runs[0]["kernel"],
            "tokens": runs[0]["tokens"],
            "plan": plan,
            "microseconds": mean(plan),
        },
        **{"rule": rule, "rule_microseconds": mean(rule), "tried": 1 + len(others)},
        "date": datetime.date.today().isoformat(),
    }


def add_records(target: str, results: list[str], source: str) -> None:
    """Replace the records of the same kernels, or append."""
    from moqc.schedules import plan_records
    from moqc.schedules.cpu.plan import TUNED

    path = plan_records.FOLDER / f"{target}.json"
    content = {"schema": plan_records.SCHEMA, "source": source, "target": target, "records": []}
    if path.is_file():
        old = json.loads(path.read_text())
        before = old["source"]
        content |= {
            "source": before if source in before else f"{before}; {source}",
            "records": old["records"],
        }
    names = (*plan_records.KEY, "format")
    known = {tuple(map(row.get, names)): row for row in content["records"]}
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in (row for name in results for row in json.loads(Path(name).read_text())["rows"]):
        owner, *_, part = row["block"].split(":")
        if owner == target and row["tokens"] == TUNED[part]:
            runs.setdefault((row["block"], row["kernel"]), []).append(row)
    for found in map(record, runs.values()):
        known[tuple(map(found.get, names))] = found
        print(found["plan"], round(found["rule_microseconds"] / found["microseconds"], 3), found)
    path.write_text(json.dumps({**content, "records": list(known.values())}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=("build", "run", "records"))
    parser.add_argument("folder", type=Path, help="OUT, or TARGET")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--plans", default="")
    parser.add_argument("--seconds", type=float, default=2.0, help="of a block and number of tokens")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no block is begun")
    parser.add_argument("--source", default="", help="machine, threads and versions of records")
    options = parser.parse_args()
    if options.what == "records":
        add_records(str(options.folder), options.names, options.source)
        return
    if options.what == "build":
        build(options.folder, options.names, list(filter(None, options.plans.split(","))))
        return
    out, begin, rows = Path(options.names[0]), time.time(), []
    chosen = options.names[1:] or sorted(each.name for each in options.folder.iterdir())
    for name in chosen:
        if time.time() - begin > options.limit:
            break
        rows += time_block(options.folder / name, options.seconds)
        draft = out.with_suffix(".draft")
        draft.write_text(json.dumps({"threads": os.environ.get("TVM_NUM_THREADS"), "rows": rows}, indent=1))
        draft.replace(out)


if __name__ == "__main__":
    main()
