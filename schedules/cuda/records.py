"""Which plan a kernel gets: that found by search on an H200 where there is a record, else the rules'."""

from __future__ import annotations

from moqc.schedules.cuda.plan import (
    SHARED_BYTES,
    ExpertsShape,
    Plan,
    down_rule,
    gate_up_rule,
    many_down_plan,
    shared_bytes,
)
from moqc.schedules.plan_records import Records, record_key, shipped

ARCHITECTURE = "sm_90"


def load() -> Records:
    """What ``benchmarks/tune_plans.py`` found."""
    found = shipped(ARCHITECTURE)
    assert found is not None, "a file of moqc's is missing"
    return found


def find(kernel: str, shape: ExpertsShape, tokens: int) -> Plan | None:
    """The plan found for ``gate_up`` or ``down`` at 1 or 8 tokens, if it fits this layer's formats."""
    formats = shape.down if kernel == "down" else (*shape.gate, *shape.up)
    sizes = (shape.experts, shape.top_k, shape.hidden, shape.intermediate)
    text = load().plans.get(record_key(kernel, tokens, sizes, formats))
    if text is None or not shape.gate:
        return None
    found, projections = Plan.parse(text), 2 if kernel == "gate_up" else 1
    return found if shared_bytes(found, projections, formats) <= SHARED_BYTES else None


def plans(shape: ExpertsShape, shared: int, *, tuned: bool) -> tuple[dict[str, Plan], dict[str, str]]:
    """The plans of a layer's kernels by name, and the sources of records; `tuned`: there may be some."""
    result = {"down_many": many_down_plan(shape, shared)}
    recorded: dict[str, str] = {}
    for kernel, rule in (("gate_up", gate_up_rule), ("down", down_rule)):
        for tokens in (1, 8):
            name, found = f"{kernel}_{tokens}", find(kernel, shape, tokens) if tuned else None
            result[name] = found or rule(shape, tokens, shared)
            recorded |= {name: load().source} if found else {}
    return result, recorded
