"""Products with one packed matrix, for any number of tokens, on NVIDIA GPUs, of ``linear.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.errors import UserError
from moqc.quant.formats import Format
from moqc.quant.pack_mma import COLUMNS, ROWS, packed_shapes
from moqc.schedules.cuda.emit import Kernel, kernel, scale_type
from moqc.schedules.cuda.templates import format_of

FEW = 8
"""Tokens of a block of the decode kernel."""
MOST = 64
"""Tokens up to which it is used: a tile of the kernel for many took 17 to 23 times as long as 8 tokens here
(H200), however many it held."""
WARPS = 16
"""Most warps of its blocks."""
WAVE = 264
"""Blocks that are worth having: two for each multiprocessor of an H200."""
MANY_WARPS, COLUMN_TILES = 8, 8
"""Of a block of the kernel for many tokens: its warps, and tiles of 8 tokens."""


@dataclass(frozen=True)
class LinearShape:
    """What a linear's kernels depend on: a matrix [rows, columns], and what is added to the product."""

    format: Format
    rows: int
    columns: int
    lead: int
    """Axes of x before the last."""
    bias: bool = False
    residual: bool = False

    def __post_init__(self) -> None:
        if self.columns % 8:
            raise UserError(
                f"a linear of {self.rows} x {self.columns}: the CUDA kernels want columns in eights"
            )


def workspace_bytes(columns: int, tokens: Any) -> Any:
    """Bytes of the workspace for `tokens` tokens, an int or an int64 expression: x in fp16, and factors."""
    return tokens * (_padded(columns) * 2 + 16)


def linear_function(shapes: Sequence[LinearShape]) -> tirx.PrimFunc:
    """Build the function of linears that read the same x: equal columns and leading axes.

    Its parameters: x float32 ``[*lead, K]``; for each linear codes, scales and zeros (unless symmetric) of
    the matrix in layout mma16x256, bias float32 ``[N]`` and residual float32 ``[*lead, N]`` as the shape
    says; and the outputs workspace uint8 ``[workspace_bytes(K, T)]`` (T: the product of the leading axes) and
    for each y float32 ``[*lead, N]``.
    """
    columns = shapes[0].columns
    facts = {"formats": [str(shape.format) for shape in shapes], "rows": [shape.rows for shape in shapes]}
    with kernel("linear", columns=columns, **facts) as k:
        lead = [tirx.Var(f"n{axis}", "int64") for axis in range(shapes[0].lead)]
        tokens = product(lead)
        x = k.parameter("x", [*lead, columns], "float32")
        members = []
        for shape in shapes:
            pointers = declare_matrix(k, shape.format, shape.rows, columns)[1]
            # What is not there is not read either; any pointer to floats will do.
            pointers.append(k.parameter("bias", [shape.rows], "float32") if shape.bias else x)
            there = shape.residual
            pointers.append(k.parameter("residual", [*lead, shape.rows], "float32") if there else x)
            members.append(pointers)
        workspace = k.bytes("workspace", workspace_bytes(columns, tokens))
        halves = [T.address_of(workspace[tokens * 16]), T.address_of(workspace[0])]
        for shape, pointers in zip(shapes, members, strict=True):
            pointers.append(k.parameter("y", [*lead, shape.rows], "float32"))
        arguments = [pointer for pointers in members for pointer in pointers]
        with T.If(tokens == 1):
            with T.Then():
                _launch_few(k, shapes, x, tokens, arguments, 1)
            with T.Else(), T.If(tokens <= MOST):
                with T.Then():
                    _launch_few(k, shapes, x, tokens, arguments, FEW)
                with T.Else():
                    _launch_many(k, shapes, x, halves, tokens, arguments)
    return k.finish()


def declare_matrix(k: Kernel, format: Format, rows: int | None, columns: int) -> tuple[Any, list[Any]]:
    """Declare one packed matrix of `rows` rows, None: of any number.

    Returns its row tiles, and pointers to codes, scales and zeros.
    """
    codes_shape, groups_shape = packed_shapes(format, ROWS if rows is None else rows, columns)
    tiles = tirx.Var("tiles", "int64") if rows is None else codes_shape[0]
    codes = k.parameter("codes", [tiles, *codes_shape[1:]], "uint8")
    scales = k.parameter("scales", [tiles, *groups_shape[1:]], scale_type(format))
    zeros = codes if format.symmetric else k.parameter("zeros", [tiles, *groups_shape[1:]], "uint8")
    return tiles, [codes, scales, zeros]


def product(extents: Sequence[Any]) -> Any:
    """The product of int64 expressions."""
    result: Any = tirx.const(1, "int64")
    for extent in extents:
        result = result * extent
    return result


def _padded(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS


def _launch_few(
    k: Kernel, shapes: Sequence[LinearShape], x: Any, tokens: Any, arguments: Sequence[Any], most: int
) -> None:
    """`most` tokens a block, 1 or 8, and whole rows: as few row tiles as give every multiprocessor work."""
    columns = shapes[0].columns
    warps = min(-(-columns // COLUMNS), WARPS)
    total = sum(-(-shape.rows // ROWS) for shape in shapes)
    plans = [_tiles(shape, max(1, min(8, total * warps // (WAVE * 8)))) for shape in shapes]
    function = f"moqc::linears_few<{columns}, {warps}, {most}, {_members(shapes, plans)}>"
    blocks = sum(-(-shape.rows // ROWS) // tiles for shape, tiles in zip(shapes, plans, strict=True))
    shared = max(plans) * warps * ROWS * most * 4
    across = tirx.max((tokens + (most - 1)) // most, 1)
    k.launch(across * blocks, 32 * warps, shared, function, x, tirx.Cast("int32", tokens), *arguments)


def _tiles(shape: LinearShape, wanted: int) -> int:
    """The most row tiles a block up to `wanted` that divide all."""
    return max(each for each in range(1, wanted + 1) if -(-shape.rows // ROWS) % each == 0)


def _members(shapes: Sequence[LinearShape], plans: Sequence[int]) -> str:
    """C++ types of the matrices."""
    members = []
    for shape, tiles in zip(shapes, plans, strict=True):
        flags = f"{str(shape.bias).lower()}, {str(shape.residual).lower()}"
        plan = f"{tiles}, {2 if tiles % 2 == 0 else 1}"
        members.append(f"moqc::Member<{shape.rows}, {format_of(shape.format)}, {plan}, {flags}>")
    return ", ".join(members)


def _launch_many(
    k: Kernel,
    shapes: Sequence[LinearShape],
    x: Any,
    halves: Sequence[Any],
    tokens: Any,
    arguments: Sequence[Any],
) -> None:
    """Many tokens: x to fp16, then tiles of 64 tokens."""
    columns, width = shapes[0].columns, 8 * COLUMN_TILES
    k.launch(tokens, 256, 0, f"moqc::to_half<{columns}>", x, *halves)
    shared = 2 * width * (COLUMNS + 8) * 2
    rows = sum(-(-shape.rows // (ROWS * MANY_WARPS)) for shape in shapes)
    blocks = (tokens + (width - 1)) // width * rows
    members = _members(shapes, [1] * len(shapes))
    function = f"moqc::linears_many<{columns}, {MANY_WARPS}, {COLUMN_TILES}, {members}>"
    k.launch(blocks, 32 * MANY_WARPS, shared, function, *halves, tirx.Cast("int32", tokens), *arguments)
