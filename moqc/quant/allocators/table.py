"""The allocators by name."""

from __future__ import annotations

from collections.abc import Callable

from moqc.errors import UserError
from moqc.quant.allocators.frequency import frequency
from moqc.quant.allocators.global_ import global_
from moqc.quant.allocators.pmq import pmq
from moqc.quant.allocators.uniform import uniform
from moqc.quant.problem import Problem, Solution

ALLOCATORS: dict[str, Callable[[Problem], Solution]] = {
    "uniform": uniform,
    "frequency": frequency,
    "pmq": pmq,
    "global": global_,
}


def find_allocator(name: str) -> Callable[[Problem], Solution]:
    """The allocator called `name`; UserError with the known names."""
    if name not in ALLOCATORS:
        raise UserError(f"unknown allocator {name!r}: known are {', '.join(ALLOCATORS)}")
    return ALLOCATORS[name]
