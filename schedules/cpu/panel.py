"""Blocks of 16 rows unpacked into a thread's own memory, and their product with many tokens.

A panel looks the same whatever the format it was filled from, so one product serves all bit classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE
from moqc.quant.pack import FOURS, LINE
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import (
    Index,
    bind,
    broadcast,
    int64,
    load,
    loop,
    scratch,
    splat,
    store,
    workspace,
)
from moqc.schedules.cpu.tiles import Activations, Block


@dataclass(frozen=True)
class Panel:
    """Unpacked 16-row blocks of `count` matrices, in the thread's memory.

    * int8: `codes` uint8 [count, K32, 8, 64]; `scales` and `shifts` (scale * zero point) float32
      [count, K32, 16].
    * float: `codes` float32 [count, K32*32, 16], the dequantized weights.
    """

    tiles: int
    codes: Any
    scales: Any | None = None
    shifts: Any | None = None

    @classmethod
    def allocate(cls, quantized: bool, tiles: int, count: int) -> Panel:
        """A panel for `count` blocks of `tiles` column tiles."""
        if not quantized:
            return cls(tiles, workspace(count * tiles * COLUMN_TILE * ROW_TILE, "float32"))
        size = count * tiles * ROW_TILE
        return cls(
            tiles,
            workspace(count * tiles * FOURS * LINE, "uint8"),
            workspace(size, "float32"),
            workspace(size, "float32"),
        )

    def at(self, slot: Index, tile: Index, half: int, lanes: int) -> Any:
        """Offset of a tile's scales and shifts."""
        return (int64(slot) * self.tiles + tile) * ROW_TILE + half * lanes


def fill_panel(family: DotFamily, block: Block, panel: Panel, slot: int) -> None:
    """Unpack `block` into place `slot` of `panel`."""
    lanes, per_group = family.lanes, block.weights.format.group // COLUMN_TILE
    with loop(0, panel.tiles) as tile:
        group = T.truncdiv(tile, int64(per_group))
        for half in range(family.halves):
            operands = block.operands(tile, half, family)
            scale = bind(block.scale(group, half, lanes))
            zero = bind(block.zero_point(group, half, lanes))
            if panel.scales is None:
                _fill_float(panel, operands, scale, zero, (slot * panel.tiles + tile) * COLUMN_TILE, half)
                continue
            for v, operand in enumerate(operands):
                line = (slot * panel.tiles + tile) * FOURS + v
                raw = T.reinterpret(f"uint8x{4 * lanes}", operand)
                store(panel.codes, [line * LINE + half * 4 * lanes], raw)
            store(panel.scales, [panel.at(slot, tile, half, lanes)], scale)
            store(panel.shifts, [panel.at(slot, tile, half, lanes)], scale * zero)


def _fill_float(panel: Panel, operands: list[Any], scale: Any, zero: Any, column: Any, half: int) -> None:
    """Dequantize a tile: ``scale * (code - zero)``."""
    lanes = scale.ty.dtype.lanes
    for v, operand in enumerate(operands):
        for j in range(4):
            code = operand >> splat(8 * j, lanes, "uint32") & splat(255, lanes, "uint32")
            value = code.astype(f"int32x{lanes}").astype(f"float32x{lanes}")
            store(panel.codes, [(column + 4 * v + j) * ROW_TILE + half * lanes], scale * (value - zero))


def panel_product(
    family: DotFamily, panel: Panel, slot: Index, x: Activations, row: Index, tokens: int, wide: bool
) -> list[list[Any]]:
    """Multiply a panel's block with the rows `row .. row + tokens`: scratch vectors by token, then half."""
    totals = [[scratch(family.lanes) for _ in range(family.halves)] for _ in range(tokens)]
    for vector in [half for token in totals for half in token]:
        store(vector, [0], splat(0, family.lanes))
    for half in range(family.halves):
        with loop(0, panel.tiles) as tile:
            columns = [token[half] for token in totals]
            if x.quantized:
                _add_panel_tile(family, panel, slot, x, row, tile, half, columns, wide)
            else:
                _add_float_tile(family, panel, slot, x, row, tile, half, columns)
    return totals


def _add_panel_tile(
    family: DotFamily,
    panel: Panel,
    slot: Index,
    x: Activations,
    row: Index,
    tile: Any,
    half: int,
    totals: Sequence[Any],
    wide: bool,
) -> None:
    """Add one column tile of int8 activations, for every token."""
    lanes = family.lanes
    states: list[Any] = [None] * len(totals)
    for v in range(FOURS):
        at = ((int64(slot) * panel.tiles + tile) * FOURS + v) * LINE + half * 4 * lanes
        codes = bind(T.reinterpret(f"uint32x{lanes}", load(panel.codes, [at], f"uint8x{4 * lanes}")))
        for m in range(len(totals)):
            state = family.step(states[m], codes, x.four(row + m, tile, v, lanes), wide)
            states[m] = tuple(map(bind, state)) if isinstance(state, tuple) else bind(state)
    scale = bind(load(panel.scales, [panel.at(slot, tile, half, lanes)], f"float32x{lanes}"))
    shift = bind(load(panel.shifts, [panel.at(slot, tile, half, lanes)], f"float32x{lanes}"))
    for m, total in enumerate(totals):
        step = broadcast(load(x.scales, [row + m, tile]), lanes)
        part = broadcast(load(x.sums, [row + m, tile]), lanes)
        product = family.finish(states[m]).astype(f"float32x{lanes}") * step
        value = load(total, [0], f"float32x{lanes}") + product * scale - part * shift
        store(total, [0], value)


def _add_float_tile(
    family: DotFamily,
    panel: Panel,
    slot: Index,
    x: Activations,
    row: Index,
    tile: Any,
    half: int,
    totals: Sequence[Any],
) -> None:
    """Add one column tile of float activations, for every token."""
    lanes = family.lanes
    with loop(0, COLUMN_TILE) as column:
        at = ((int64(slot) * panel.tiles + tile) * COLUMN_TILE + column) * ROW_TILE + half * lanes
        weight = bind(load(panel.codes, [at], f"float32x{lanes}"))
        for m, total in enumerate(totals):
            value = broadcast(load(x.values, [row + m, tile * COLUMN_TILE + column]), lanes)
            store(total, [0], load(total, [0], f"float32x{lanes}") + value * weight)
