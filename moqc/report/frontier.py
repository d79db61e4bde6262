"""The predicted trade of size against harm: least total cost at every budget, from the measured costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from moqc.errors import BudgetError
from moqc.quant.allocators.global_ import global_
from moqc.quant.formats import Format
from moqc.quant.problem import PROJECTIONS, Problem
from moqc.report.data import Report

TABLE_BITS = 192
"""Stored bits of an expert in the routing table, which is inside of every budget."""
POINTS = 16


@dataclass(frozen=True, slots=True)
class Point:
    """A way to store the experts: its name, file bits per weight, and summed cost."""

    name: str
    bits: float
    cost: float


def frontier(report: Report) -> tuple[Point, ...]:
    """The best mixed plans between the smallest and the largest measured format; empty without costs."""
    names = report.measured_formats
    if len(names) < 2:
        return ()
    low, high = report.uniform_bits(names[0]), report.uniform_bits(names[-1])
    points = []
    for bits in np.linspace(low * 1.01, high, POINTS):
        problem = _problem(report, names, float(bits))
        try:
            found = global_(problem)
        except BudgetError:
            continue
        points.append(Point(f"mixed {bits:.2f}", problem.bits_per_weight(found.size), found.cost))
    return tuple(points)


def uniform_points(report: Report) -> tuple[Point, ...]:
    """One format for all experts, for every format whose cost was measured."""
    return tuple(
        Point(name, report.uniform_bits(name), report.uniform_cost(name)) for name in report.measured_formats
    )


def _problem(report: Report, names: list[str], bits: float) -> Problem:
    units, costs, sizes, weights = [], [], [], []
    formats = tuple(Format.parse(name) for name in names)
    for number, block in enumerate(report.blocks):
        for projection, by_format in block.costs.items():
            rows, columns = report.shapes[block.site].shape(projection)
            stored = [fmt.stored_bits(rows, columns) for fmt in formats]
            for expert in range(block.experts):
                units.append((number, expert, PROJECTIONS.index(projection)))
                costs.append([by_format[name][expert] for name in names])
                sizes.append(stored)
                weights.append(rows * columns)
    table = np.array(units, dtype=np.int64)
    total = sum(weights)
    overhead = TABLE_BITS * sum(block.experts for block in report.blocks)
    return Problem(
        sites=tuple(block.site for block in report.blocks),
        unit_site=table[:, 0],
        unit_expert=table[:, 1],
        unit_projection=table[:, 2],
        formats=formats,
        costs=np.array(costs, dtype=np.float64),
        sizes=np.array(sizes, dtype=np.int64),
        weights=np.array(weights, dtype=np.int64),
        budget_bits=math.floor(bits * total) + overhead,
        overhead_bits=overhead,
    )
