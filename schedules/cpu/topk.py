"""The k largest of each row, largest first; of equal values the one of lower index first.

k passes over the row, which suits routers: tens to hundreds of columns and k below ten. (TVM's own top-k
calls a sort in a library that its plain runtime lacks.)
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.schedules.cpu.emit import bind, int64, kernel, load, loop, store, symbol, unravel, when
from moqc.schedules.cpu.vector import PARALLEL_WORK, parallel_if


def topk_kernel(columns: int, k: int, dtype: str, *, lead: int) -> tirx.PrimFunc:
    """Build the selection of `k` of `columns` values.

    Parameters of the PrimFunc: x float32 ``[*lead axes, columns]``, and the outputs ``[*lead axes, k]``:
    values float32 and indices of type `dtype`. Indices are distinct, also where values are NaN or equal.
    """
    with kernel("topk", columns=columns, k=k) as built:
        axes = [symbol(f"n{axis}") for axis in range(lead)]
        x = built.parameter("x", [*axes, columns], "float32")
        values = built.parameter("values", [*axes, k], "float32")
        indices = built.parameter("indices", [*axes, k], dtype)
        rows: Any = int64(1)
        for axis in axes:
            rows = rows * axis

        def row(number: Any) -> None:
            at = [bind(index) for index in unravel(number, axes)] if axes else []
            taken = T.alloc_buffer((columns,), "bool")
            best = T.alloc_buffer((1,), "int32")
            with loop(0, columns) as i:
                store(taken, [i], T.bool(False))
            with loop(0, k) as j:
                store(best, [0], T.int32(-1))
                with loop(0, columns) as i, when(tirx.Not(load(taken, [i]))):
                    chosen = int64(tirx.max(load(best, [0]), T.int32(0)))
                    better = load(x, [*at, i]) > load(x, [*at, chosen])
                    with when(tirx.Or(load(best, [0]) < 0, better)):
                        store(best, [0], tirx.Cast("int32", i))
                chosen = bind(int64(load(best, [0])))
                store(taken, [chosen], T.bool(True))
                store(values, [*at, j], load(x, [*at, chosen]))
                store(indices, [*at, j], tirx.Cast(dtype, chosen))

        parallel_if(rows * (k * columns) > PARALLEL_WORK, rows, row)
    return built.finish()
