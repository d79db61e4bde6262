"""Matrices outside the experts as units of the allocation problem: one budget for the whole model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.sizes import kept_bits, model_weights
from moqc.quant.formats import Format
from moqc.quant.problem import Problem


def add_linears(
    problem: Problem, costs: dict[str, Any], checkpoint: Checkpoint, bits: float
) -> tuple[Problem, list[str]]:
    """`problem` with a unit for every site of `costs` (site -> format -> cost) behind the others.

    The budget is `bits` a weight of the whole model, less what is not quantized at all (norms, routers,
    biases), at its stored width. Units have the formats that were measured for them. Returns the problem and
    the sites of the new units, in order.
    """
    names = sorted(costs)
    wanted = {Format.parse(name) for by_format in costs.values() for name in by_format}
    formats = (*problem.formats, *sorted(wanted - set(problem.formats)))
    shapes = [checkpoint.shape(f"{name}.weight") for name in names]
    experts, count = len(problem.weights), len(names)
    extra = len(formats) - len(problem.formats)
    allowed = np.zeros((experts + count, len(formats)), dtype=np.bool_)
    allowed[:experts, : len(problem.formats)] = problem.permitted
    new_costs = np.zeros(allowed.shape)
    new_costs[:experts, : len(problem.formats)] = problem.costs
    for row, name in enumerate(names, experts):
        for column, fmt in enumerate(formats):
            if str(fmt) in costs[name]:
                allowed[row, column] = True
                new_costs[row, column] = costs[name][str(fmt)]
    sizes = np.concatenate(
        [
            np.pad(problem.sizes, ((0, 0), (0, extra)), constant_values=1),
            np.array([[fmt.stored_bits(*shape) for fmt in formats] for shape in shapes], dtype=np.int64),
        ]
    )
    kept = kept_bits(checkpoint, {f"{name}.weight" for name in names})
    zeros = np.zeros(count, dtype=np.int64)
    grown = replace(
        problem,
        sites=(*problem.sites, *names),
        unit_site=np.concatenate([problem.unit_site, len(problem.sites) + np.arange(count)]),
        unit_expert=np.concatenate([problem.unit_expert, zeros]),
        unit_projection=np.concatenate([problem.unit_projection, zeros]),
        formats=formats,
        costs=new_costs,
        sizes=sizes,
        weights=np.concatenate([problem.weights, _counts(shapes)]),
        budget_bits=math.floor(bits * model_weights(checkpoint)),
        overhead_bits=problem.overhead_bits + kept,
        allowed=allowed,
    )
    return grown, names


def _counts(shapes: Sequence[tuple[int, ...]]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array([math.prod(shape) for shape in shapes], dtype=np.int64)
