"""Which plan a kernel gets: that found by search where there is a record, else the rules'.

The user's records come first (`Target.records`), then those of an H200, which are for sm_90 alone.
Plans for more than 8 tokens come in pairs, of kernels whose warps own rows and whose tiles have as many slots
(see `ladder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moqc.schedules.cuda.ladder import UPPER
from moqc.schedules.cuda.plan import (
    COLUMN_TOKENS,
    SHARED_BYTES,
    ExpertsShape,
    down_rule,
    gate_up_rule,
    many_down_plan,
)
from moqc.schedules.cuda.quads import MOST_TOKENS, QuadsPlan, fits, quads_bytes, quads_rules
from moqc.schedules.cuda.templates import AnyPlan, block_bytes, parse_plan
from moqc.schedules.plan_records import Records, read, record_key, shipped
from moqc.targets import Target

ARCHITECTURE = "sm_90"
TOKENS = (1, COLUMN_TOKENS, *UPPER)
"""What plans are searched at."""


def load() -> Records:
    """What searches on an H200 found."""
    found = shipped(ARCHITECTURE)
    assert found is not None, "a file of moqc's is missing"
    return found


def sources(target: Target) -> tuple[Records, ...]:
    """The records that a target's plans are taken from, the first first."""
    own = () if target.records is None else (read(Path(target.records)),)
    return (*own, load()) if target.warp_groups else own


def find(
    kernel: str, shape: ExpertsShape, tokens: int, records: Records, shared: int = SHARED_BYTES
) -> AnyPlan | None:
    """The plan found for ``gate_up`` or ``down`` at one of `TOKENS`, if it fits this layer's formats.

    Records of the int8 kernels for several tokens have the names ``gate_up_quads`` and ``down_quads``, beside
    those of slots; up to 8 tokens a layer that has them uses no others.
    """
    formats, most = shape.formats(kernel), UPPER.get(tokens, tokens)
    if not shape.gate:
        return None
    quads = tokens > 1 and most is not None and most <= MOST_TOKENS and quads_rules(shape, shared) is not None
    for name in (f"{kernel}_quads", kernel):
        text = records.plans.get(record_key(name, tokens, shape.sizes, formats))
        if text is None:
            continue
        plan, projections = parse_plan(text), 2 if kernel == "gate_up" else 1
        if isinstance(plan, QuadsPlan):
            needed = quads_bytes(plan, projections, formats, (most or 0) * shape.top_k, shape.experts)
            if quads and fits(plan, needed, shared):
                return plan
        elif not (quads and tokens <= COLUMN_TOKENS) and block_bytes(plan, projections, formats) <= shared:
            return plan
    return None


def _recorded(shape: ExpertsShape, tokens: int, records: Records, shared: int) -> dict[str, AnyPlan]:
    """What is recorded; for more than 8 tokens both kernels with tiles of as many slots, or nothing."""
    both = {
        f"{kernel}_{tokens}": find(kernel, shape, tokens, records, shared) for kernel in ("gate_up", "down")
    }
    found = {name: plan for name, plan in both.items() if plan is not None}
    alike = len(found) == 2 and len({getattr(plan, "slots", 0) for plan in found.values()}) == 1
    return found if tokens <= COLUMN_TOKENS or alike else {}


def plans(
    shape: ExpertsShape, shared: int, records: Sequence[Records] = ()
) -> tuple[dict[str, AnyPlan], dict[str, str]]:
    """The plans of a layer's kernels by name, and the sources of those that are from `records`."""
    result: dict[str, AnyPlan] = {
        "gate_up_many": gate_up_rule(shape, COLUMN_TOKENS, shared),
        "down_many": many_down_plan(shape, shared),
    }
    for tokens in (1, COLUMN_TOKENS):
        result[f"gate_up_{tokens}"] = gate_up_rule(shape, tokens, shared)
        result[f"down_{tokens}"] = down_rule(shape, tokens, shared)
    quads = quads_rules(shape, shared)
    if quads is not None:
        result[f"gate_up_{COLUMN_TOKENS}"], result[f"down_{COLUMN_TOKENS}"] = quads
    found: dict[str, str] = {}
    for each in reversed(records):  # the first one last: it decides
        for tokens in TOKENS:
            recorded = _recorded(shape, tokens, each, shared)
            result |= recorded
            found |= dict.fromkeys(recorded, each.source)
    return result, found
