"""The plans that a search on the device may try for a kernel; no TVM here.

A plan is the argument of a template, not a sequence of TIR transformations, so MetaSchedule's traces cannot
express it: `moqc tune` compiles and times what is listed here, and the best become records
(`moqc.schedules.plan_records`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product
from typing import TypeVar

from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS
from moqc.schedules.cuda.plan import (
    COLUMN_TOKENS,
    MULTIPROCESSORS,
    SHARED_BYTES,
    ExpertsShape,
    Plan,
    divisors,
    down_rule,
    gate_up_rule,
    shared_bytes,
)
from moqc.schedules.cuda.quads import QuadsPlan, fits, most_pairs, quads_bytes, quads_rules
from moqc.schedules.cuda.rows import RowsPlan, rows_bytes
from moqc.schedules.cuda.templates import AnyPlan, SlotsPlan, block_bytes

P = TypeVar("P")
WAVES = (0.4, 12.0)
"""Blocks of a launch for each multiprocessor."""
MOST_TILES = 32
WAYS = ((True, 1), (True, 2), (True, 4), (False, 3), (False, 4), (False, 6))
"""Through registers or rings, and how many tiles of weights are on their way."""
ONE_TOKEN = ((True, 2), (True, 4), (True, 6), (True, 8))
"""The same for 1 token: two row tiles at a time."""
REGISTERS = 65536
"""Of a multiprocessor."""
QUADS_WARPS = (4, 6, 8, 10, 12, 16, 20, 24)
"""Of a block of the int8 kernels."""
FEWEST_WARPS = 9
"""On a multiprocessor, where warps own rows."""


def plan_space(kernel: str, shape: ExpertsShape, tokens: int, shared: int) -> tuple[AnyPlan, list[AnyPlan]]:
    """The rules' plan of ``gate_up`` or ``down`` for 1 or 8 tokens, and all plans that are worth a trial.

    `shared` is what a block may have of shared memory.
    """
    first = kernel == "gate_up"
    rules = quads_rules(shape, shared) if tokens > 1 else None
    if rules is not None:  # both kernels are of int8, or neither
        return rules[not first], [*quads_space(kernel, shape, tokens, shared)]
    rule, space = (gate_up_rule, gate_up_space) if first else (down_rule, down_space)
    plans: list[SlotsPlan] = [*space(shape, tokens)]
    if tokens > 1:
        plans += [plan for plan in rows_space(kernel, shape, tokens) if plan.tokens == COLUMN_TOKENS]
    formats, projections = shape.formats(kernel), 2 if first and shape.gate else 1
    fitting = [plan for plan in plans if block_bytes(plan, projections, formats) <= shared]
    default = rule(shape, tokens, shared)
    return default, [*(fitting or [default])]


def quads_space(kernel: str, shape: ExpertsShape, tokens: int, shared: int) -> Iterator[QuadsPlan]:
    """Plans of the int8 kernels, ``gate_up`` or ``down``, of a call of `tokens` tokens."""
    first = kernel == "gate_up"
    rows, columns = (shape.intermediate, shape.hidden) if first else (shape.hidden, shape.intermediate)
    formats, matrices = shape.formats(kernel), 2 if first and shape.gate else 1
    units, hit = -(-columns // COLUMNS), min(shape.experts, tokens * shape.top_k)
    for some, blocks in product([units] if first else divisors(units), (1, 2, 3)):
        pairs = most_pairs(hit, rows, units // some, blocks)
        for split, depth, warps, most in product((1, 2, 3, 4, 7), (1, 2, 3, 4), QUADS_WARPS, (4, 8)):
            if some % (split * depth) or not 8 <= warps * blocks <= 32:
                continue
            plan = QuadsPlan(warps, pairs, some, split, depth, most, blocks)
            needed = quads_bytes(plan, matrices, formats, tokens * shape.top_k, shape.experts)
            if fits(plan, needed, shared):
                yield plan


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


def rows_space(kernel: str, shape: ExpertsShape, tokens: int) -> list[RowsPlan]:
    """Plans of kernels whose warps own rows: ``gate_up`` or ``down`` of a call of `tokens` tokens."""
    first = kernel == "gate_up"
    rows, columns = shape.intermediate, shape.hidden
    formats, projections = (*shape.gate, *shape.up), 2 if shape.gate else 1
    if not first:
        rows, columns, formats, projections = columns, rows, shape.down, 1
    units, pairs = -(-columns // COLUMNS), -(-rows // (2 * ROWS))
    mean = tokens * shape.top_k / shape.experts  # tokens of an expert
    tiles = [8] if len(set(formats)) > 1 else [8, 16, 24, 32]
    found = []
    for tile, some, each in product(tiles, [units] if first else divisors(units), divisors(pairs)):
        if tile > max(COLUMN_TOKENS, 2 * mean):
            continue
        hit = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
        items = hit * max(1.0, 0.5 + mean / tile)
        blocks = items * (pairs // each) * (units // some)
        if not 0.7 <= blocks / MULTIPROCESSORS <= WAVES[1]:
            continue
        for split, warps, depth in product(
            divisors(some), (4, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32), (1, 2, 3)
        ):
            plan = RowsPlan(warps, each, some, split, depth, tile)
            if _keeps_busy(plan, projections, formats, blocks):
                found.append(plan)
    return found


def _keeps_busy(plan: RowsPlan, projections: int, formats: tuple[Format, ...], blocks: float) -> bool:
    """Whether a plan fits a block, deals its runs evenly, and puts enough warps on a multiprocessor."""
    runs = plan.pairs * plan.split * (projections if plan.slots == 1 else 1)
    shared = rows_bytes(plan, projections, formats)
    if shared > SHARED_BYTES or runs < plan.warps or (plan.slots > 1 and plan.split > 1):
        return False
    if runs % plan.warps and runs < 3.5 * plan.warps:
        return False
    bits = max(fmt.bits for fmt in formats)
    needed = 48 + 8 * bits * plan.depth + 20 * (plan.slots - 1)  # registers a thread, about
    if needed > REGISTERS / (32 * plan.warps):
        return False
    resident = min(
        SHARED_BYTES // (shared + 1024), max(1, 64 // plan.warps), -(-int(blocks) // MULTIPROCESSORS)
    )
    return resident * plan.warps >= FEWEST_WARPS


def sample(plans: list[P], count: int, seed: int = 0) -> list[P]:
    """At most `count` of them, drawn without replacement."""
    return plans if len(plans) <= count else random.Random(seed).sample(plans, count)


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
            for registers, stages in ONE_TOKEN if tokens == 1 else WAYS:
                plan = Plan(warps, tiles, stages, registers, tokens, items)
                whole = not registers or projections * tiles % stages == 0
                if whole and shared_bytes(plan, projections, formats) <= SHARED_BYTES:
                    yield plan
