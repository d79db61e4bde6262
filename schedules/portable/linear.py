"""A quantized linear projection: ``y = x W^T + bias``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, Format
from moqc.schedules.cpu.emit import bind, ceildiv, int64, kernel, load, store, symbol, unravel
from moqc.schedules.portable.emit import divide, each, groups, product
from moqc.schedules.portable.multiply import TOKENS, Product, Rows, clamped
from moqc.schedules.portable.weights import Choice, Stack, check_format


@dataclass(frozen=True)
class LinearShape:
    """What the kernel of a projection depends on."""

    format: Format
    rows: int
    columns: int
    bias: bool = False


def linear_function(shape: LinearShape) -> tirx.PrimFunc:
    """Build the function: x float32 ``[T, K]``, words uint32, bias float32 ``[N]`` if any, y ``[T, N]``."""
    check_format(shape.format)
    with kernel("linear", format=str(shape.format), rows=shape.rows, columns=shape.columns) as k:
        tokens = symbol("t")
        x = k.parameter("x", [tokens, shape.columns], "float32")
        words = k.parameter("words", [symbol("words")], "uint32")
        bias = k.parameter("bias", [shape.rows], "float32") if shape.bias else None
        y = k.parameter("y", [tokens, shape.rows], "float32")
        stack = Stack(words, shape.format, shape.rows, shape.columns, 0, 1)
        with T.If(tokens == 1):
            with T.Then():
                _launch(shape, stack, x, bias, y, tokens, 1)
            with T.Else():
                _launch(shape, stack, x, bias, y, tokens, TOKENS)
    return k.finish()


def _launch(shape: LinearShape, stack: Stack, x: Any, bias: Any, y: Any, tokens: Any, count: int) -> None:
    with groups(stack.row_tiles, tirx.ceildiv(tokens, int64(count))) as (tile, part, thread):
        first = bind(part * count)
        sums = Product(thread, 1, count)
        rows = Rows(x, lambda token: clamped(first + token, tokens))
        sums.add(tile, [Choice((stack,), None, int64(0))], rows)

        def write(row: Any, token: Any, totals: list[Any]) -> None:
            value = totals[0] if bias is None else totals[0] + load(bias, [row])
            with T.If(first + token < tokens), T.Then():
                store(y, [first + token, row], value)

        sums.finish(tile, shape.rows, write)


def embedding_function(format: Format, rows: int, columns: int, *, dtype: str, lead: int) -> tirx.PrimFunc:
    """Build the rows `ids` (`dtype` ``[*lead]``) of a packed table of `rows` rows: ids, words, result.

    A thread decodes 32 columns. An id outside the table reads its nearest row.
    """
    check_format(format)
    with kernel("embedding", format=str(format), columns=columns) as k:
        extents = [symbol(f"n{axis}") for axis in range(lead)]
        ids = k.parameter("ids", extents, dtype)
        words = k.parameter("words", [symbol("words")], "uint32")
        y = k.parameter("y", [*extents, columns], "float32")
        stack, blocks = Stack(words, format, rows, columns, 0, 1), ceildiv(columns, COLUMN_TILE)
        with each(product(extents) * blocks) as number:
            at = [bind(index) for index in unravel(divide(number, blocks), extents)]
            block = bind(tirx.truncmod(number, int64(blocks)))
            wanted = tirx.Cast("int64", load(ids, at))
            row = bind(tirx.max(tirx.min(wanted, int64(rows - 1)), int64(0)))
            weights = T.alloc_buffer((COLUMN_TILE,), "float32", scope="local")
            place = (divide(row, 16), tirx.truncmod(row, int64(16)))
            scale = stack.decode(int64(0), bind(place[0]), bind(place[1]), block, weights, 0)
            for column in range(COLUMN_TILE):
                to = block * COLUMN_TILE + column
                with T.If(to < columns), T.Then():
                    store(y, [*at, to], load(weights, [column]) * scale)
    return k.finish()
