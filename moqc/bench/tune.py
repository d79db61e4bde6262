"""Search the plans of the experts kernels on this machine; what was found becomes records.

Every trial compiles the kernels (gate_up and down, for several numbers of tokens) with the next plan of each
search and times them in turns with those of the default plans: machines change their speed, ratios do not.
What a search found is timed once more, checked against the reference, and recorded if it is faster.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moqc.bench.kernels import parse_classes
from moqc.bench.search import Name, Plans, Search, TunedLayer
from moqc.bench.shapes import Shape, find_shape
from moqc.bench.tune_cpu import CpuLayer, cpu_machine
from moqc.bench.tune_cuda import CudaLayer, cuda_machine
from moqc.errors import InternalError, TargetError, UserError
from moqc.keywords import keywords
from moqc.log import event, logger, track
from moqc.options import TuneOptions
from moqc.quant.formats import Format
from moqc.schedules import plan_records as records
from moqc.targets import Target, find_target

MARGIN = 0.98
"""A plan has to be faster than the default by this factor."""
FINAL = 3
"""How much longer the last comparison takes."""

Row = dict[str, Any]

MACHINES: dict[
    str, tuple[Callable[[Target], str], Callable[[Target, Shape, Sequence[Format]], TunedLayer]]
] = {
    "cpu": (cpu_machine, CpuLayer),
    "cuda": (cuda_machine, CudaLayer),
}
"""Set of schedules -> the machine with its versions (TargetError where it cannot run the target), and how its
layers are timed."""


@keywords(TuneOptions)
def tune(out: Path, options: TuneOptions) -> list[Row]:
    """Search for every shape and entry of `bits`; `out` is written after each, and continued if it is there.

    Raises UserError for unknown names and a file of another machine, TargetError where this machine cannot
    run the target.
    """
    target = find_target(options.target)
    if options.trials < 1:
        raise UserError(f"trials {options.trials}: must be at least 1")
    tasks = [
        (name, find_shape(name), parse_classes(bits)) for name in options.shapes for bits in options.bits
    ]
    if target.schedules not in MACHINES:
        raise TargetError(
            f"{target.name}: its kernels have no plans to choose from; tune is for CPUs and cuda"
        )
    machine, timed = MACHINES[target.schedules]
    source = f"{machine(target)}: moqc tune --target {target.name}"
    rows = _known(out, source)
    for name, shape, formats in track(tasks, "tuning"):
        if any(_about(row, shape, formats) for row in rows):
            continue
        found = _tune(timed(target, shape, formats), shape, formats, options.trials)
        for row in found:
            gain = row["rule_microseconds"] / row["microseconds"]
            about = f"{name} {'/'.join(map(str, formats))} {row['kernel']} {row['tokens']}"
            event("tuned", f"{about}: {row['plan']} {gain:.2f}x", **row)
        rows += found
        _write(out, {"schema": records.SCHEMA, "source": source, "target": target.name, "records": rows})
    return rows


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


def _tune(layer: TunedLayer, shape: Shape, formats: Sequence[Format], trials: int) -> list[Row]:
    """The records of one shape."""
    spaces = layer.spaces()
    searches = {name: Search(space) for name, space in spaces.items()}
    for _ in range(trials):
        tried = {name: search.propose() for name, search in searches.items()}
        for name, (seconds, default) in layer.compare(tried).items():
            what = f"{name[0]} {name[1]} {tried[name]}"
            logger.debug(f"{what}: {seconds / default:.3f} of {1e6 * default:.1f} us")
            searches[name].report(tried[name], seconds / default)
    times = layer.compare({name: search.best for name, search in searches.items()}, FINAL)
    chosen: dict[Name, Any] = {}
    for name, search in searches.items():
        seconds, default = times[name]
        chosen[name] = search.best if seconds < MARGIN * default else spaces[name].default
    _check(layer, chosen, shape)
    rows = []
    for name, plan in chosen.items():
        (seconds, default), rule = times[name], spaces[name].default
        rows.append(
            {
                **_facts(shape, formats),
                **{"kernel": name[0], "tokens": name[1], "plan": str(plan)},
                "microseconds": round(1e6 * (default if plan == rule else seconds), 2),
                **{"rule": str(rule), "rule_microseconds": round(1e6 * default, 2)},
                **{"tried": searches[name].tried, "date": datetime.date.today().isoformat()},
            }
        )
    return rows


def _check(layer: TunedLayer, chosen: Plans, shape: Shape) -> None:
    error, allowed = layer.error(chosen)
    if not error <= allowed:
        raise InternalError(
            f"plans {', '.join(map(str, chosen.values()))} on {shape}: relative error {error:.1e} against "
            "the reference; nothing was recorded"
        )
