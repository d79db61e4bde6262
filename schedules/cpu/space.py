"""The plans that a search may try; no TVM here.

They change what a builder emits (the loop over columns, the size of a thread's buffers, prefetches), not the
loops of a finished PrimFunc: no trace of MetaSchedule's expresses them (docs/decisions.md).
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import TypeVar

from moqc.schedules.cpu.plan import PanelPlan, Plan, RowsPlan, SeveralPlan

P = TypeVar("P", bound=Plan)

SPACE: dict[type[Plan], dict[str, tuple[int, ...]]] = {
    RowsPlan: {"tasks": (1, 2, 4, 8, 16, 32), "ahead": (16, 32, 64, 128, 256), "unroll": (1, 2, 4)},
    SeveralPlan: {"rows": (1, 2, 4, 8), "least": (3, 4, 6, 8, 12, 16, 24)},
    PanelPlan: {
        "tasks": (1, 2, 4, 8, 16),
        "batch": (1, 2, 4, 8, 16),
        "many": (2, 4, 8, 16),
        "ahead": (16, 32, 64, 128, 256),
    },
}
"""Kind of plan -> the numbers that each field may have."""


def neighbours(plan: P) -> list[P]:
    """The plans that differ in one number, by a step of the space; fields take turns."""
    steps: list[list[P]] = []
    for name, values in SPACE[type(plan)].items():
        at = values.index(getattr(plan, name))
        near = [values[each] for each in (at - 1, at + 1) if 0 <= each < len(values)]
        steps.append([replace(plan, **{name: value}) for value in near])
    turns = itertools.zip_longest(*steps)
    return [each for turn in turns for each in turn if each is not None]


def draw(kind: type[P], generator: random.Random) -> P:
    """Any plan of the space."""
    return kind(**{name: generator.choice(values) for name, values in SPACE[kind].items()})
