"""The allocators by name."""

from __future__ import annotations

from collections.abc import Callable

from moqc.errors import UserError
from moqc.quant.allocators.blocks import block_importance, ewq, outlier_score
from moqc.quant.allocators.frequency import frequency
from moqc.quant.allocators.gemq import gemq
from moqc.quant.allocators.global_ import global_
from moqc.quant.allocators.moqa import moqa
from moqc.quant.allocators.mxmoe import mxmoe
from moqc.quant.allocators.pmq import pmq
from moqc.quant.allocators.uniform import uniform
from moqc.quant.problem import Problem, Solution

ALLOCATORS: dict[str, Callable[[Problem], Solution]] = {
    "uniform": uniform,
    "frequency": frequency,
    "block-importance": block_importance,
    "outlier-score": outlier_score,
    "ewq": ewq,
    "moqa": moqa,
    "pmq": pmq,
    "gemq": gemq,
    "mxmoe": mxmoe,
    "global": global_,
}


def find_allocator(name: str) -> Callable[[Problem], Solution]:
    """The allocator called `name`; UserError with the known names."""
    if name not in ALLOCATORS:
        raise UserError(f"unknown allocator {name!r}: known are {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]
