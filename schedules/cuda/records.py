"""Which plan a kernel gets: that found by search on an H200 where there is a record, else the rules'.

Plans for more than 8 tokens come in pairs, of kernels whose warps own rows and whose tiles have as many slots
(see `ladder`).
"""

from __future__ import annotations

from moqc.schedules.cuda.ladder import UPPER
from moqc.schedules.cuda.plan import (
    COLUMN_TOKENS,
    SHARED_BYTES,
    ExpertsShape,
    down_rule,
    gate_up_rule,
    many_down_plan,
)
from moqc.schedules.cuda.templates import AnyPlan, block_bytes, parse_plan
from moqc.schedules.plan_records import Records, record_key, shipped

ARCHITECTURE = "sm_90"
TOKENS = (1, COLUMN_TOKENS, *UPPER)
"""What plans are searched at."""


def load() -> Records:
    """What ``benchmarks/tune_plans.py`` and ``benchmarks/layers.py`` found."""
    found = shipped(ARCHITECTURE)
    assert found is not None, "a file of moqc's is missing"
    return found


def find(kernel: str, shape: ExpertsShape, tokens: int) -> AnyPlan | None:
    """The plan found for ``gate_up`` or ``down`` at one of `TOKENS`, if it fits this layer's formats."""
    formats = shape.formats(kernel)
    text = load().plans.get(record_key(kernel, tokens, shape.sizes, formats))
    if text is None or not shape.gate:
        return None
    found, projections = parse_plan(text), 2 if kernel == "gate_up" else 1
    return found if block_bytes(found, projections, formats) <= SHARED_BYTES else None


def _recorded(shape: ExpertsShape, tokens: int) -> dict[str, AnyPlan]:
    """What is recorded; for more than 8 tokens both kernels with tiles of as many slots, or nothing."""
    both = {f"{kernel}_{tokens}": find(kernel, shape, tokens) for kernel in ("gate_up", "down")}
    found = {name: plan for name, plan in both.items() if plan is not None}
    alike = len(found) == 2 and len({plan.slots for plan in found.values()}) == 1
    return found if tokens <= COLUMN_TOKENS or alike else {}


def plans(shape: ExpertsShape, shared: int, *, tuned: bool) -> tuple[dict[str, AnyPlan], dict[str, str]]:
    """The plans of a layer's kernels by name, and the sources of records; `tuned`: there may be some."""
    recorded: dict[str, AnyPlan] = {}
    for tokens in TOKENS if tuned else ():
        recorded |= _recorded(shape, tokens)
    result: dict[str, AnyPlan] = {"down_many": many_down_plan(shape, shared)}
    for tokens in (1, COLUMN_TOKENS):
        result[f"gate_up_{tokens}"] = gate_up_rule(shape, tokens, shared)
        result[f"down_{tokens}"] = down_rule(shape, tokens, shared)
    return result | recorded, dict.fromkeys(recorded, load().source) if recorded else {}
