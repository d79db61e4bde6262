"""The plans that a search on the device may try for a kernel; no TVM here.

A plan is the argument of a template, not a sequence of TIR transformations, so MetaSchedule's traces cannot
express it: `benchmarks/tune_plans.py` compiles and times what is listed here, and the best become records
(`moqc.schedules.plan_records`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.plan import (
    COLUMN_TOKENS,
    MULTIPROCESSORS,
    SHARED_BYTES,
    ExpertsShape,
    Plan,
    divisors,
    shared_bytes,
)

WAVES = (0.4, 12.0)
"""Blocks of a launch for each multiprocessor."""
MOST_TILES = 32


def gate_up_space(shape: ExpertsShape, tokens: int) -> list[Plan]:
    """Plans of the first product for `tokens` (1 or 8) tokens."""
    warps, rows = -(-shape.hidden // COLUMNS), -(-shape.intermediate // ROWS)
    formats, projections = (*shape.gate, *shape.up), 2 if shape.gate else 1
    return list(_fitting(rows, warps, tokens, projections, formats, shape.slots(tokens)))


def down_space(shape: ExpertsShape, tokens: int) -> list[Plan]:
    """Plans of the second product; a block's warps may take units of several experts."""
    units, rows = -(-shape.intermediate // COLUMNS), -(-shape.hidden // ROWS)
    total = shape.slots(tokens) * units
    found: list[Plan] = []
    for warps in sorted({4, 8, 12, 16, 24, 32, min(total, 32), -(-total // 2)}):
        if warps <= min(total, 32):
            found += _fitting(rows, warps, tokens, 1, shape.down, -(-total // warps))
    return found


def sample(plans: list[Plan], count: int, seed: int = 0) -> list[Plan]:
    """At most `count` of them, drawn without replacement."""
    return plans if len(plans) <= count else random.Random(seed).sample(plans, count)


def neighbours(plan: Plan, plans: list[Plan]) -> list[Plan]:
    """Those of `plans` that differ from `plan` in one respect: warps, tiles, items or the way of loading."""

    def facts(each: Plan) -> tuple[object, ...]:
        return each.warps, each.tiles, each.items, (each.registers, each.stages)

    return [each for each in plans if sum(a != b for a, b in zip(facts(each), facts(plan), strict=True)) == 1]


def _fitting(
    rows: int, warps: int, tokens: int, projections: int, formats: tuple[Format, ...], slots: int
) -> Iterator[Plan]:
    """Every plan that fits a block, and whose launch is neither too small nor too cut up."""
    for tiles in divisors(rows):
        for items in divisors(rows // tiles):
            blocks = slots * (rows // (tiles * items))
            if tiles > MOST_TILES or not WAVES[0] <= blocks / MULTIPROCESSORS <= WAVES[1]:
                continue
            if tokens < COLUMN_TOKENS and items > 1:
                continue  # activations are prepared once in any case
            for registers, stages in ((True, 1), (True, 2), (True, 4), (False, 3), (False, 4), (False, 6)):
                plan = Plan(warps, tiles, stages, registers, tokens, items)
                whole = not registers or projections * tiles % stages == 0
                if whole and shared_bytes(plan, projections, formats) <= SHARED_BYTES:
                    yield plan
