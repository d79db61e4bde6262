"""Linears with an unquantized float32 matrix, such as the router.

Threads share the blocks of `lanes` rows of the matrix, and each multiplies its blocks with all tokens.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import bind, ceildiv, int64, kernel, load, loop, store, symbol, unravel
from moqc.schedules.cpu.vector import PARALLEL_WORK, block_product, parallel_if


def dense_linear_kernel(rows: int, columns: int, *, lead: int, lanes: int) -> tirx.PrimFunc:
    """Build ``x @ W.T``.

    Parameters of the PrimFunc: x float32 ``[*lead axes, columns]``, W float32 ``[rows, columns]``, and the
    output float32 ``[*lead axes, rows]``.
    """
    with kernel("dense_linear", rows=rows, columns=columns) as k:
        axes = [symbol(f"n{axis}") for axis in range(lead)]
        x = k.parameter("x", [*axes, columns], "float32")
        weight = k.parameter("weight", [rows, columns], "float32")
        out = k.parameter("out", [*axes, rows], "float32")
        tokens: Any = int64(1)
        for axis in axes:
            tokens = tokens * axis

        def block(number: Any) -> None:
            row = bind(number * lanes)
            with loop(0, tokens) as token:
                at = [bind(index) for index in unravel(token, axes)] if axes else []
                value = block_product(weight, [], row, rows - 1, x, at, (columns, lanes))
                _store_block(out, at, row, rows, value, lanes)

        parallel_if(tokens * (rows * columns) > PARALLEL_WORK, ceildiv(rows, lanes), block)
    return k.finish()


def _store_block(target: Any, at: list[Any], row: Any, rows: int, value: Any, lanes: int) -> None:
    """Write a block's vector to ``target[*at, row..]``, without the rows from `rows` on."""
    if rows % lanes == 0:
        store(target, [*at, row], value)
        return
    kept = T.alloc_buffer((lanes,), "float32")
    store(kept, [0], value)
    with loop(0, tirx.min(int64(lanes), rows - row)) as lane:
        store(target, [*at, row + lane], load(kept, [lane]))
