"""Norms, top-k, rows of embedding tables and float32 linears on NVIDIA GPUs, of ``dense.cu``."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.schedules.cuda.emit import kernel
from moqc.schedules.cuda.linear import declare_matrix, product
from moqc.schedules.cuda.templates import CPP, format_of

MOST_CHOICES = 2048
"""Columns of a top-k; a lane keeps a 32nd of them in registers."""


def rms_norm_function(
    columns: int, epsilon: float, *, weighted: bool, lead: int, added: bool = False
) -> tirx.PrimFunc:
    """Build ``x * rsqrt(mean(x^2) + epsilon) * weight``: x float32 ``[*lead, columns]``, weight, result.

    If something is `added` to x, that comes after x, and the sum before the result.
    """
    with kernel("rms_norm", columns=columns) as k:
        rows = [tirx.Var(f"n{axis}", "int64") for axis in range(lead)]
        x = k.parameter("x", [*rows, columns], "float32")
        more = k.parameter("added", [*rows, columns], "float32") if added else x
        weight = k.parameter("weight", [columns], "float32") if weighted else x
        total = k.parameter("total", [*rows, columns], "float32") if added else None
        y = k.parameter("y", [*rows, columns], "float32")
        threads = min(1024, max(32, columns // 4 // 32 * 32))
        function = f"moqc::rms_norm<{columns}, {str(weighted).lower()}, {str(added).lower()}>"
        arguments = [x, more, weight, tirx.const(epsilon, "float32"), y if total is None else total, y]
        k.launch(product(rows), threads, 0, function, *arguments)
    return k.finish()


def dense_linear_function(rows: int, columns: int, *, lead: int) -> tirx.PrimFunc:
    """Build ``x W'``: x float32 ``[*lead, columns]``, W float32 ``[rows, columns]``, the product."""
    if columns % 4:
        raise UserError(f"a linear of {rows} x {columns}: the CUDA kernels want columns in fours")
    with kernel("dense_linear", rows=rows, columns=columns) as k:
        extents = [tirx.Var(f"n{axis}", "int64") for axis in range(lead)]
        tokens = product(extents)
        x = k.parameter("x", [*extents, columns], "float32")
        w = k.parameter("w", [rows, columns], "float32")
        y = k.parameter("y", [*extents, rows], "float32")
        with T.If(tokens <= 8):
            for each, branch in ((1 if rows <= 1024 else 4, T.Then()), (4, T.Else())):
                with branch:
                    blocks = (tokens + 7) // 8 * -(-rows // (4 * each))
                    function = f"moqc::linear_dense<{rows}, {columns}, {each}>"
                    k.launch(blocks, 128, 0, function, x, tirx.Cast("int32", tokens), w, y)
    return k.finish()


def top_k_function(
    columns: int, count: int, dtype: str, *, lead: int, softmax: bool = False, normalize: bool = False
) -> tirx.PrimFunc:
    """Build the largest `count` of the last axis of float32 x: x, values float32, indices `dtype`.

    With `softmax` the values are those of the softmax of x, with `normalize` divided by their sum.
    """
    if columns > MOST_CHOICES:
        raise UserError(f"a top-k of {columns}: the CUDA kernels take up to {MOST_CHOICES}")
    with kernel("top_k", columns=columns, count=count) as k:
        extents = [tirx.Var(f"n{axis}", "int64") for axis in range(lead)]
        rows = product(extents)
        x = k.parameter("x", [*extents, columns], "float32")
        values = k.parameter("values", [*extents, count], "float32")
        ids = k.parameter("ids", [*extents, count], dtype)
        flags = f"{str(softmax).lower()}, {str(normalize).lower()}"
        function = f"moqc::top_k<{columns}, {count}, {flags}, {CPP[dtype]}>"
        k.launch((rows + 3) // 4, 128, 0, function, x, tirx.Cast("int32", rows), values, ids)
    return k.finish()


def advance_function(vocabulary: int) -> tirx.PrimFunc:
    """Build the greedy step: logits float32 ``[B, 1, V]``, ids and positions int64 ``[B, 1]``, changed."""
    with kernel("advance", vocabulary=vocabulary) as k:
        rows = tirx.Var("b", "int64")
        logits = k.parameter("logits", [rows, 1, vocabulary], "float32")
        state = [k.parameter(name, [rows, 1], "int64") for name in ("ids", "positions")]
        k.launch(rows, 1024, 0, f"moqc::advance<{vocabulary}>", logits, *state)
    return k.finish()


def embedding_function(format: Format, columns: int, *, dtype: str, lead: int) -> tirx.PrimFunc:
    """Build the rows `ids` (`dtype` ``[*lead]``) of a packed table: ids, codes, scales, zeros, result."""
    with kernel("embedding", format=str(format), columns=columns) as k:
        extents: list[Any] = [tirx.Var(f"n{axis}", "int64") for axis in range(lead)]
        ids = k.parameter("ids", extents, dtype)
        tiles, packed = declare_matrix(k, format, None, columns)
        y = k.parameter("y", [*extents, columns], "float32")
        function = f"moqc::embedding<{columns}, {format_of(format)}, {CPP[dtype]}>"
        threads = min(256, -(-columns // 32) * 32)
        k.launch(product(extents), threads, 0, function, ids, tirx.Cast("int32", tiles * 16), *packed, y)
    return k.finish()
