"""Which plan a kernel gets: that found by search on the device where there is a record, else the rules'.

``records.json`` has the outcome of `benchmarks/tune_plans.py`: for each kernel, number of tokens (1 or 8),
size of the experts and formats (the widest code, whether there are several formats, and zeros) the fastest
plan, with the machine and the versions. The plans are for sm_90.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any

from moqc.schedules.cuda.plan import (
    SHARED_BYTES,
    ExpertsShape,
    Plan,
    down_rule,
    gate_up_rule,
    many_down_plan,
    shared_bytes,
)

SCHEMA = 1
KEY = ("kernel", "tokens", "experts", "top_k", "hidden", "intermediate", "bits", "several", "zeros")
"""What a record goes by; `zeros`: whether any of the formats is asymmetric."""


@cache
def load() -> dict[str, Any]:
    """The file: "schema", "source" (machine, date, versions) and "records"."""
    text = resources.files("moqc.schedules.cuda").joinpath("records.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


@cache
def _plans() -> dict[tuple[Any, ...], Plan]:
    return {tuple(row[name] for name in KEY): Plan.parse(row["plan"]) for row in load()["records"]}


def find(kernel: str, shape: ExpertsShape, tokens: int) -> Plan | None:
    """The plan found for ``gate_up`` or ``down`` at 1 or 8 tokens, if it fits this layer's formats."""
    formats = shape.down if kernel == "down" else (*shape.gate, *shape.up)
    sizes = (shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    facts = max(fmt.bits for fmt in formats), len(set(formats)) > 1, any(not fmt.symmetric for fmt in formats)
    found = _plans().get((kernel, tokens, *sizes, *facts))
    projections = 2 if shape.gate and kernel == "gate_up" else 1
    if found is None or not shape.gate or shared_bytes(found, projections, formats) > SHARED_BYTES:
        return None
    return found


def plans(shape: ExpertsShape, shared: int, *, tuned: bool) -> tuple[dict[str, Plan], list[str]]:
    """The plans of a layer's kernels by name, and which of them are records; `tuned`: there may be some."""
    result, recorded = {"down_many": many_down_plan(shape, shared)}, []
    for kernel, rule in (("gate_up", gate_up_rule), ("down", down_rule)):
        for tokens in (1, 8):
            name, found = f"{kernel}_{tokens}", find(kernel, shape, tokens) if tuned else None
            result[name] = found or rule(shape, tokens, shared)
            recorded += [name] if found else []
    return result, recorded
