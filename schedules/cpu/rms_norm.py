"""Root mean square normalization of the last axis."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, store, symbol, unravel
from moqc.schedules.cpu.vector import (
    PARALLEL_WORK,
    common_lanes,
    parallel_if,
    reduce_lanes,
    spread,
    vector_type,
)

_ACCUMULATORS = 4
"""Sums kept side by side, so that an addition need not wait for the one before."""


def rms_norm_kernel(columns: int, epsilon: float, *, weighted: bool, lead: int, lanes: int) -> tirx.PrimFunc:
    """Build ``x / sqrt(mean(x^2) + epsilon)``, times the weight if `weighted`.

    Parameters of the PrimFunc, float32: x ``[*lead axes, columns]``, weight ``[columns]`` if there, output.
    """
    lanes = common_lanes(lanes, columns)
    kind = vector_type(lanes)
    step = lanes * _ACCUMULATORS if columns % (lanes * _ACCUMULATORS) == 0 else lanes
    with kernel("rms_norm", columns=columns) as k:
        axes = [symbol(f"n{axis}") for axis in range(lead)]
        x = k.parameter("x", [*axes, columns], "float32")
        weight = k.parameter("weight", [columns], "float32") if weighted else None
        out = k.parameter("out", [*axes, columns], "float32")
        rows: Any = int64(1)
        for axis in axes:
            rows = rows * axis

        def row(number: Any) -> None:
            at = [bind(index) for index in unravel(number, axes)] if axes else []
            sums = T.alloc_buffer((step,), "float32")
            for start in range(0, step, lanes):
                store(sums, [start], spread(0.0, lanes))
            with loop(0, columns // step) as block:
                for start in range(0, step, lanes):
                    value = bind(load(x, [*at, block * step + start], kind))
                    store(sums, [start], load(sums, [start], kind) + value * value)
            for start in range(lanes, step, lanes):
                store(sums, [0], load(sums, [0], kind) + load(sums, [start], kind))
            mean = reduce_lanes(sums, lanes, lambda one, other: one + other) * (1.0 / columns)
            scale = bind(1.0 / tirx.sqrt(mean + T.float32(epsilon)))
            with loop(0, columns // lanes) as block:
                value = load(x, [*at, block * lanes], kind) * spread(scale, lanes)
                if weight is not None:
                    value = value * load(weight, [block * lanes], kind)
                store(out, [*at, block * lanes], value)

        parallel_if(rows * (2 * columns) > PARALLEL_WORK, rows, row)
    return k.finish()
