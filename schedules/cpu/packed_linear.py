"""Packed linear layers: ``y[..., N] = x @ W^T + bias``, for one token or many."""

from __future__ import annotations

import functools
import operator
from typing import Any

from tvm import tirx

from moqc.quant.formats import ROW_TILE, Format
from moqc.schedules.cpu.blocks import Choice, Product, blocks_together, load_rows, start_products, store_rows
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import bind, ceildiv, int64, kernel, parallel, symbol, unravel
from moqc.schedules.cpu.plan import default_plans
from moqc.schedules.cpu.tiles import Activations, Weights


def linear_kernel(
    family: DotFamily, fmt: Format, rows: int, columns: int, *, mode: str, bias: bool, lead: int
) -> tirx.PrimFunc:
    """Build the kernel of a ``[rows, columns]`` matrix.

    Parameters of the PrimFunc: the activations (`Activations.declare`, M rows and spare ones), codes, scales,
    zeros unless symmetric, bias [rows] if `bias`, and the output float32 [*lead axes, rows] with M = the
    product of its `lead` leading extents.
    """
    with kernel("linear", format=str(fmt), activations=mode, dot=family.name) as k:
        x = Activations.declare(k, mode, symbol("rows"), columns)
        weights = Weights.declare(k, "", fmt, ceildiv(rows, ROW_TILE), columns)
        offsets = k.parameter("bias", [rows], "float32") if bias else None
        extents = [symbol(f"d{axis}") for axis in range(lead)]
        y = k.parameter("y", [*extents, rows], "float32")
        tokens = functools.reduce(operator.mul, extents, int64(1))
        start_products(family, x)
        blocks = ceildiv(rows, ROW_TILE)
        together = blocks_together(family, 1)
        with parallel(ceildiv(blocks, together)) as item:

            def finish(token: Any, row_block: Any, half: int, values: list[Any]) -> None:
                row = row_block * ROW_TILE + half * family.lanes
                value = values[0]
                if offsets is not None:
                    value = value + load_rows(family, offsets, [], row, rows)
                store_rows(family, y, unravel(token, extents), row, rows, value)

            first = bind(item * together)
            last = bind(tirx.min(first + together, int64(blocks)))
            product = Product(
                family, [Choice((weights,))], x, (first, last), finish, default_plans(family.lanes)
            )
            product.multiply(int64(0), tokens)
    return k.finish()
