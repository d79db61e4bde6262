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
from moqc.schedules.cuda.emit import Kernel, kernel

FEW = 8
"""Tokens of the decode kernel."""
WARPS = 16
"""Most warps of its blocks."""
WAVE = 264
"""Blocks that are worth having: two for each multiprocessor of an H200."""
COLUMN_TILES = 8
"""Tiles of 8 tokens that a block of the kernel for more tokens takes."""


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
        if self.format.bits == 1:
            raise UserError("linears of 1 bit: the CUDA kernels have 1 bit for experts only")


def workspace_bytes(shape: LinearShape, tokens: Any) -> Any:
    """Bytes of the workspace for `tokens` tokens, an int or an int64 expression: x in fp16, and factors."""
    return tokens * (_padded(shape.columns) * 2 + 16)


def linear_function(shape: LinearShape) -> tirx.PrimFunc:
    """Build the function.

    Its parameters: x float32 ``[*lead, K]``, codes, scales and zeros (unless symmetric) of the matrix in
    layout mma16x256, bias float32 ``[N]`` and residual float32 ``[*lead, N]`` as the shape says, and the
    outputs workspace uint8 ``[workspace_bytes(shape, T)]`` (T: the product of the leading axes) and y float32
    ``[*lead, N]``.
    """
    with kernel("linear", format=str(shape.format), rows=shape.rows, columns=shape.columns) as k:
        lead = [tirx.Var(f"n{axis}", "int64") for axis in range(shape.lead)]
        tokens = product(lead)
        at: dict[str, Any] = {"x": k.parameter("x", [*lead, shape.columns], "float32")}
        _, at["packed"] = declare_matrix(k, shape.format, shape.rows, shape.columns)
        # What is not there is not read either; any pointer to floats will do.
        at["bias"] = k.parameter("bias", [shape.rows], "float32") if shape.bias else at["x"]
        at["residual"] = at["x"]
        if shape.residual:
            at["residual"] = k.parameter("residual", [*lead, shape.rows], "float32")
        workspace = k.bytes("workspace", workspace_bytes(shape, tokens))
        at["factors"] = T.address_of(workspace[0])
        at["halves"] = T.address_of(workspace[tokens * 16])
        at["y"] = k.parameter("y", [*lead, shape.rows], "float32")
        with T.If(tokens == 1):
            with T.Then():
                _launch_few(k, shape, at, tokens, 1)
            with T.Else(), T.If(tokens <= FEW):
                with T.Then():
                    _launch_few(k, shape, at, tokens, FEW)
                with T.Else():
                    _launch_many(k, shape, at, tokens)
    return k.finish()


def declare_matrix(k: Kernel, format: Format, rows: int | None, columns: int) -> tuple[Any, list[Any]]:
    """Declare one packed matrix of `rows` rows, None: of any number.

    Returns its row tiles, and pointers to codes, scales and zeros.
    """
    codes_shape, groups_shape = packed_shapes(format, ROWS if rows is None else rows, columns)
    tiles = tirx.Var("tiles", "int64") if rows is None else codes_shape[0]
    codes = k.parameter("codes", [tiles, *codes_shape[1:]], "uint8")
    scales = k.parameter("scales", [tiles, *groups_shape[1:]], "float16")
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


def _launch_few(k: Kernel, shape: LinearShape, at: dict[str, Any], tokens: Any, most: int) -> None:
    """Up to `most` tokens, 1 or 8: whole rows a block, as few row tiles as give every multiprocessor work."""
    warps = min(-(-shape.columns // COLUMNS), WARPS)
    row_tiles = -(-shape.rows // ROWS)
    wanted = max(1, min(8, row_tiles * warps // (WAVE * 8)))
    tiles = max(each for each in range(1, wanted + 1) if row_tiles % each == 0)
    stages = 2 if tiles % 2 == 0 else 1
    plan = f"moqc::Plan<{warps}, {tiles}, {stages}, true, {most}, 1>"
    function = f"moqc::linear_few<{_facts(shape)}, {plan}, {_flags(shape)}>"
    shared = tiles * warps * ROWS * most * 4
    arguments = [at["x"], tirx.Cast("int32", tokens), *at["packed"], at["bias"], at["residual"], at["y"]]
    k.launch(row_tiles // tiles, 32 * warps, shared, function, *arguments)


def _launch_many(k: Kernel, shape: LinearShape, at: dict[str, Any], tokens: Any) -> None:
    """More tokens: x to fp16, then tiles of 64 tokens, by few rows where there is but one of them."""
    halves = [at["halves"], at["factors"]]
    k.launch(tokens, 256, 0, f"moqc::to_half<{shape.columns}>", at["x"], *halves)
    arguments = [*halves, tirx.Cast("int32", tokens), *at["packed"], at["bias"], at["residual"], at["y"]]
    width = 8 * COLUMN_TILES
    shared = 2 * width * (COLUMNS + 8) * 2
    with T.If(tokens <= width):
        for warps, branch in ((2, T.Then()), (8, T.Else())):
            with branch:
                blocks = (tokens + (width - 1)) // width * -(-shape.rows // (ROWS * warps))
                function = f"moqc::linear_many<{_facts(shape)}, {warps}, {COLUMN_TILES}, {_flags(shape)}>"
                k.launch(blocks, 32 * warps, shared, function, *arguments)


def format_of(format: Format) -> str:
    """The C++ type of a format."""
    return f"moqc::Format<{format.bits}, {format.group}, {str(format.symmetric).lower()}>"


def _facts(shape: LinearShape) -> str:
    return f"{shape.rows}, {shape.columns}, {format_of(shape.format)}"


def _flags(shape: LinearShape) -> str:
    return f"{str(shape.bias).lower()}, {str(shape.residual).lower()}"
