"""Packed matrices and activations as kernels read them, and the product of 16 rows with one token."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import ACTIVATION_GROUP, COLUMN_TILE, ROW_TILE, Format
from moqc.quant.pack import BYTE_SCALE_SHIFT, FIELDS, FOURS, LINE
from moqc.schedules.cpu.dot import DotFamily, four_everywhere
from moqc.schedules.cpu.emit import (
    Index,
    Kernel,
    bind,
    broadcast,
    ceildiv,
    int64,
    load,
    loop,
    prefetch,
    scratch,
    splat,
    store,
)
from moqc.schedules.cpu.plan import RowsPlan
from moqc.schedules.cpu.trellis import trellis_operands

ACTIVATION_TILES = ACTIVATION_GROUP // COLUMN_TILE
"""Column tiles that share a scale of the activations; groups of weights have as many, or 2, or 1."""
PREFETCH_GROUPS = 64
"""How many groups ahead scales and zeros are asked for: what a page of codes is about as long as."""


@dataclass(frozen=True)
class Weights:
    """The buffers of packed matrices in one format; `stacked` ones have a leading axis."""

    format: Format
    columns: int
    codes: Any
    scales: Any
    zeros: Any | None
    stacked: bool

    @classmethod
    def declare(
        cls,
        kernel: Kernel,
        prefix: str,
        fmt: Format,
        blocks: Index,
        columns: int,
        count: Index | None = None,
    ) -> Weights:
        """Add the kernel parameters of a matrix of `blocks` x 16 rows, or of a stack of `count`."""
        lead = [] if count is None else [count]
        codes = [*lead, blocks, ceildiv(columns, COLUMN_TILE), fmt.bits, LINE]
        per_group = [*lead, blocks, fmt.groups(columns), ROW_TILE]
        return cls(
            fmt,
            columns,
            kernel.parameter(f"{prefix}codes", codes, "uint8"),
            kernel.parameter(f"{prefix}scales", per_group, "uint8" if fmt.byte_scales else "float16"),
            None if fmt.symmetric else kernel.parameter(f"{prefix}zeros", per_group, "uint8"),
            count is not None,
        )

    @property
    def tiles(self) -> int:
        """Column tiles of a row."""
        return ceildiv(self.columns, COLUMN_TILE)

    def block(self, index: Index, row_block: Index) -> Block:
        """The 16 rows `row_block` of matrix `index` (ignored unless stacked)."""
        return Block(self, (index, row_block) if self.stacked else (row_block,))


@dataclass(frozen=True)
class Block:
    """16 rows of a packed matrix."""

    weights: Weights
    at: tuple[Index, ...]

    def operands(self, tile: Index, half: int, family: DotFamily) -> list[Any]:
        """The eight dot operands of a column tile, uint32xL: lane n has 4 values of row n, one a byte."""
        if self.weights.format.trellis:
            return trellis_operands(self.weights.codes, [*self.at, tile], self.weights.format, half, family)
        lanes = family.lanes
        words = []
        for line in range(self.weights.format.bits):
            at = [*self.at, tile, line, half * 4 * lanes]
            raw = load(self.weights.codes, at, f"uint8x{4 * lanes}")
            words.append(bind(T.reinterpret(f"uint32x{lanes}", raw)))
        result = []
        for fields in FIELDS[self.weights.format.bits]:
            parts = [family.extract(words[field.line], field) for field in fields]
            result.append(bind(functools.reduce(operator.or_, parts)))
        return result

    def prefetch(self, tile: Index, lines: int, *, near: bool = True, rows: int = 1) -> None:
        """Ask for the codes of a tile `lines` lines after `tile`; blocks follow each other in memory.

        `rows` are the blocks read side by side: what comes after this one is so many further.
        """
        bits = self.weights.format.bits
        *lead, row_block = self.at
        tile = tile + lines // bits
        if rows > 1:
            row_block = row_block + T.if_then_else(tile >= self.weights.tiles, int64(rows - 1), int64(0))
        for line in range(bits):
            prefetch(self.weights.codes, [*lead, row_block, tile, line, 0], near=near)

    def prefetch_group(self, group: Index) -> None:
        """Ask for the scales and zeros of the group `PREFETCH_GROUPS` after `group`."""
        prefetch(self.weights.scales, [*self.at, group + PREFETCH_GROUPS, 0], near=False)
        if self.weights.zeros is not None:
            prefetch(self.weights.zeros, [*self.at, group + PREFETCH_GROUPS, 0], near=False)

    def scale(self, group: Index, half: int, lanes: int) -> Any:
        """Scales of the rows, float32xL."""
        at = [*self.at, group, half * lanes]
        if not self.weights.format.byte_scales:
            return load(self.weights.scales, at, f"float16x{lanes}").astype(f"float32x{lanes}")
        return float_scale(load(self.weights.scales, at, f"uint8x{lanes}"), lanes)

    def zero_point(self, group: Index, half: int, lanes: int) -> Any:
        """Zero points of the rows in values, float32xL."""
        if self.weights.zeros is None:
            return splat(self.weights.format.symmetric_zero, lanes)
        stored = load(self.weights.zeros, [*self.at, group, half * lanes], f"uint8x{lanes}")
        steps = stored.astype(f"int32x{lanes}").astype(f"float32x{lanes}")
        return steps * splat(self.weights.format.zero_step, lanes)


def float_scale(stored: Any, lanes: int) -> Any:
    """Byte scales uint8xL as float32xL."""
    suffix = f"x{lanes}" if lanes > 1 else ""
    # A multiplication, because a shift wants a vector of amounts where there are several lanes.
    bits = stored.astype(f"uint16{suffix}") * tirx.const(1 << BYTE_SCALE_SHIFT, f"uint16{suffix}")
    return T.reinterpret(f"float16{suffix}", bits).astype(f"float32{suffix}")


@dataclass(frozen=True)
class Activations:
    """Inputs of a product, M rows of K: int8 codes with scales, or float32 `values`; padding is 0.

    With G groups of `ACTIVATION_GROUP` columns and K32 tiles of 32:

    * int8: `values` int8 [M, G*ACTIVATION_GROUP], `scales` float32 [M, G]; `sums` float32 [M, G] and
      `tile_sums` [M, G*ACTIVATION_TILES] (scale * sum of the codes) of groups and of tiles.
    * float: `values` float32 [M, K32*32].
    """

    values: Any
    scales: Any | None = None
    sums: Any | None = None
    tile_sums: Any | None = None

    @staticmethod
    def layout(mode: str, columns: int) -> list[tuple[str, int, str]]:
        """Name, columns and dtype of each tensor, for K = `columns`."""
        tiles, groups = ceildiv(columns, COLUMN_TILE), ceildiv(columns, ACTIVATION_GROUP)
        if mode == "float":
            return [("x", tiles * COLUMN_TILE, "float32")]
        return [
            ("x", groups * ACTIVATION_GROUP, "int8"),
            ("x_scales", groups, "float32"),
            ("x_sums", groups, "float32"),
            ("x_tile_sums", groups * ACTIVATION_TILES, "float32"),
        ]

    @classmethod
    def declare(cls, kernel: Kernel, mode: str, rows: Index, columns: int) -> Activations:
        """Add the kernel parameters."""
        return cls(
            *(
                kernel.parameter(name, [rows, width], dtype)
                for name, width, dtype in cls.layout(mode, columns)
            )
        )

    @property
    def quantized(self) -> bool:
        """Whether they are int8."""
        return self.scales is not None

    def four(self, row: Index, tile: Index, v: int, lanes: int) -> Any:
        """Columns 4v..4v+3 of a tile in every lane, int32xL."""

        def columns(first: int, count: int) -> Any:
            return load(self.values, [row, tile * COLUMN_TILE + first], f"int8x{count}")

        return four_everywhere(columns, v, lanes)

    def scale(self, row: Index, group: Any, per_group: int) -> Any:
        """The scale for group `group` of weights, which has `per_group` tiles."""
        return load(self.scales, [row, T.floordiv(group, int64(ACTIVATION_TILES // per_group))])

    def sum(self, row: Index, group: Any, per_group: int) -> Any:
        """The scaled sum of the codes in the columns of that group."""
        if per_group == ACTIVATION_TILES:
            return load(self.sums, [row, group])
        sums = [load(self.tile_sums, [row, group * per_group + t]) for t in range(per_group)]
        return functools.reduce(operator.add, sums)


def row_products(
    family: DotFamily, block: Block, x: Activations, rows: Sequence[Index], plan: RowsPlan
) -> list[list[Any]]:
    """The products of `block` with int8 activations `rows`, its codes unpacked once for all of them.

    Scratch vectors float32xL by row, then half.
    """
    lanes = family.lanes
    totals = [[scratch(lanes) for _ in range(family.halves)] for _ in rows]
    for total in [half for row in totals for half in row]:
        store(total, [0], splat(0, lanes))
    tiles, per_group = block.weights.tiles, block.weights.format.group // COLUMN_TILE
    whole, rest = divmod(tiles, per_group)
    unroll = plan.unroll * max(1, family.turn_columns // block.weights.format.group)
    turns, left = divmod(whole, unroll)

    def add(group: Any, count: int = per_group) -> None:
        _add_group(family, block, x, rows, group, count, totals, plan.ahead)

    with loop(0, turns) as turn:
        for part in range(unroll):
            add(turn * unroll + part)
    for group in range(whole - left, whole):
        add(int64(group))
    if rest:
        add(int64(whole), rest)
    return totals


def _add_group(
    family: DotFamily,
    block: Block,
    x: Activations,
    rows: Sequence[Index],
    group: Any,
    tiles: int,
    totals: list[list[Any]],
    ahead: int,
) -> None:
    """Add the first `tiles` column tiles of a group to `totals`."""
    lanes, per_group = family.lanes, block.weights.format.group // COLUMN_TILE
    counts: list[list[Any]] = [[None] * family.halves for _ in rows]
    block.prefetch_group(group)
    for t in range(tiles):
        tile = group * per_group + t
        block.prefetch(tile, ahead, near=False)
        _add_tile(family, block, x, rows, tile, counts)
    steps = [bind(broadcast(x.scale(row, group, per_group), lanes)) for row in rows]
    parts = [bind(broadcast(x.sum(row, group, per_group), lanes)) for row in rows]
    for half in range(family.halves):
        zero = block.zero_point(group, half, lanes)
        if offset := family.offset(block.weights.format.wide):
            zero = zero - splat(offset, lanes)
        zero, scale = bind(zero), bind(block.scale(group, half, lanes))
        for step, part, count, total in zip(steps, parts, counts, totals, strict=True):
            product = (count[half].astype(f"float32x{lanes}") * step - zero * part) * scale
            store(total[half], [0], load(total[half], [0], f"float32x{lanes}") + product)


def _add_tile(
    family: DotFamily, block: Block, x: Activations, rows: Sequence[Index], tile: Any, counts: list[list[Any]]
) -> None:
    """Add the int32xL sums of a column tile to `counts`, by row, then half."""
    lanes = family.lanes
    xs = [[bind(x.four(row, tile, v, lanes)) for v in range(FOURS)] for row in rows]
    for half in range(family.halves):
        states: list[Any] = [None] * len(rows)
        for v, operand in enumerate(block.operands(tile, half, family)):
            for m in range(len(rows)):
                states[m] = family.step(states[m], operand, xs[m][v], block.weights.format.wide)
        for state, count in zip(states, counts, strict=True):
            product = bind(family.finish(state))
            count[half] = product if count[half] is None else count[half] + product
