"""Blocks of 16 rows unpacked into a thread's own memory, and their product with many tokens.

A panel looks the same whatever the format it was filled from, so one product serves all bit classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE
from moqc.quant.pack import FOURS, LINE
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import (
    Index,
    bind,
    broadcast,
    ceildiv,
    int64,
    load,
    loop,
    scratch,
    splat,
    store,
    when,
    workspace,
)
from moqc.schedules.cpu.tiles import ACTIVATION_TILES, Activations, Block, Weights


@dataclass(frozen=True)
class Panel:
    """Unpacked 16-row blocks of `count` matrices, in the thread's memory.

    A span is as many column tiles as share scales of weights and activations, in all classes of the layer: 1,
    2 or `ACTIVATION_TILES`. `spans` of them cover a row, and the panel holds S, its `capacity`; tiles after
    the row's last are 0.

    * int8: `codes` uint8 [count, S*span, 8, 64]; `scales` and `shifts` (scale * zero point) float32
      [count, S, 16]. Without `shifts` codes are signed, with the zero points subtracted.
    * float: `codes` float32 [count, K32*32, 16], the dequantized weights.
    """

    tiles: int
    span: int
    capacity: int
    codes: Any
    scales: Any | None = None
    shifts: Any | None = None

    @classmethod
    def allocate(
        cls,
        quantized: bool,
        classes: Sequence[Weights],
        count: int,
        capacity: int | None = None,
        signed: bool = False,
    ) -> Panel:
        """A panel for `capacity` column tiles (else all) of `count` blocks, each of one of the `classes`.

        `signed`: the product takes signed codes, so that formats with a `Format.centre` need no shifts.
        """
        tiles = classes[0].tiles
        if not quantized:
            return cls(tiles, 1, tiles, workspace(count * tiles * COLUMN_TILE * ROW_TILE, "float32"))
        span = min(ACTIVATION_TILES, *(weights.format.group // COLUMN_TILE for weights in classes))
        spans = min(ceildiv(capacity or tiles, span), ceildiv(tiles, span))
        return cls(
            tiles,
            span,
            spans,
            workspace(count * spans * span * FOURS * LINE, "uint8"),
            workspace(count * spans * ROW_TILE, "float32"),
            None
            if signed and all(weights.format.centre for weights in classes)
            else workspace(count * spans * ROW_TILE, "float32"),
        )

    @property
    def signed(self) -> bool:
        """Whether codes are int8, with zero points subtracted."""
        return self.scales is not None and self.shifts is None

    @property
    def spans(self) -> int:
        """Number of spans in a row."""
        return ceildiv(self.tiles, self.span)

    def at(self, slot: Index, place: Index, half: int, lanes: int) -> Any:
        """Offset of the scales and shifts of the span in `place`."""
        return (int64(slot) * self.capacity + place) * ROW_TILE + half * lanes

    def line(self, slot: Index, place: Index, t: int, v: int) -> Any:
        """Number of line `v`, of 64 codes, of tile `t` of the span in `place`."""
        return ((int64(slot) * self.capacity + place) * self.span + t) * FOURS + v


def fill_panel(
    family: DotFamily, block: Block, panel: Panel, slot: int, wide: bool, first: Index = 0
) -> None:
    """Unpack `block` into `slot` of `panel`, as many spans as fit from the `first`; `wide` as for
    `panel_product`.
    """  # noqa: D205
    whole, rest = divmod(panel.tiles, panel.span)
    end = int64(first) + panel.capacity
    with loop(first, tirx.min(end, int64(whole))) as span:
        _fill_span(family, block, panel, slot, span, bind(span - first), panel.span, wide)
    if rest:
        with when(end >= panel.spans):
            _fill_span(family, block, panel, slot, int64(whole), bind(int64(whole) - first), rest, wide)


def _fill_span(
    family: DotFamily, block: Block, panel: Panel, slot: int, span: Any, place: Any, tiles: int, wide: bool
) -> None:
    """Unpack the `tiles` tiles of a span into `place`, and clear what the span has beyond them."""
    lanes, per_group = family.lanes, block.weights.format.group // COLUMN_TILE
    group = bind(T.truncdiv(span * panel.span, int64(per_group)))
    centre = block.weights.format.centre if panel.signed else None
    for half in range(family.halves):
        scale = bind(block.scale(group, half, lanes))
        zero = bind(block.zero_point(group, half, lanes))
        for t in range(panel.span):
            tile = span * panel.span + t
            if panel.scales is None:
                operands = block.operands(tile, half, family)
                _fill_float(panel, operands, scale, zero, (slot * panel.tiles + tile) * COLUMN_TILE, half)
                continue
            empty = splat(0, lanes, "uint32")
            lines = block.operands(tile, half, family) if t < tiles else [empty] * FOURS
            for v, operand in enumerate(family.panel_order(lines)):
                raw = T.reinterpret(f"uint8x{4 * lanes}", operand)
                if centre and t < tiles:
                    raw = _centred(raw, *centre)
                store(panel.codes, [panel.line(slot, place, t, v) * LINE + half * 4 * lanes], raw)
        if panel.scales is not None:
            step = scale * splat(1 / centre[0], lanes) if centre else scale
            store(panel.scales, [panel.at(slot, place, half, lanes)], step)
        if panel.shifts is not None:
            zero = zero - splat(family.offset(wide), lanes)
            store(panel.shifts, [panel.at(slot, place, half, lanes)], scale * zero)


def _centred(codes: Any, factor: int, offset: int) -> Any:
    """``factor * codes - offset`` of uint8 vectors, in two's complement; the factor is 1 or 2."""
    scaled = codes + codes if factor == 2 else codes
    return scaled - splat(offset, codes.ty.dtype.lanes, "uint8")


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
    """Multiply a panel's block with the rows `row .. row + tokens`: scratch vectors by token, then half.

    `wide` says that codes of some block may exceed 4 bits.
    """
    totals = [[scratch(family.lanes) for _ in range(family.halves)] for _ in range(tokens)]
    for vector in [half for token in totals for half in token]:
        store(vector, [0], splat(0, family.lanes))
    for half in range(family.halves):
        columns = [token[half] for token in totals]
        if not x.quantized:
            with loop(0, panel.tiles) as tile:
                _add_float_tile(family, panel, slot, x, row, tile, half, columns)
            continue
        with loop(0, panel.spans) as span:
            counts = _count_span(family, panel, slot, x, row, span, half, tokens, wide)
            add_scaled(panel, slot, x, [row + m for m in range(tokens)], (span, span), half, counts, columns)
    return totals


def _count_span(
    family: DotFamily,
    panel: Panel,
    slot: Index,
    x: Activations,
    row: Index,
    span: Any,
    half: int,
    tokens: int,
    wide: bool,
) -> list[Any]:
    """The int32xL sums over a span of codes times codes, for every token."""
    lanes = family.lanes
    counts: list[Any] = [None] * tokens
    for t in range(panel.span):
        tile = bind(span * panel.span + t)

        def line(v: int, t: int = t) -> Any:
            at = panel.line(slot, span, t, v) * LINE + half * 4 * lanes
            return bind(T.reinterpret(f"uint32x{lanes}", load(panel.codes, [at], f"uint8x{4 * lanes}")))

        def columns(m: int, first: int, count: int, tile: Any = tile) -> Any:
            return load(x.values, [row + m, tile * COLUMN_TILE + first], f"int8x{count}")

        counts = family.panel_sums(line, columns, counts, wide)
    return counts


def add_scaled(
    panel: Panel,
    slot: Index,
    x: Activations,
    rows: Sequence[Any],
    where: tuple[Any, Any],
    half: int,
    counts: Sequence[Any],
    totals: Sequence[Any],
) -> None:
    """Add a span's int32xL `counts` to `totals`, times both scales and less the zero points; one a row.

    `where` is the number of the span and its place in the panel.
    """
    span, place = where
    lanes = counts[0].ty.dtype.lanes
    scale = bind(load(panel.scales, [panel.at(slot, place, half, lanes)], f"float32x{lanes}"))
    shift = bind(load(panel.shifts, [panel.at(slot, place, half, lanes)], f"float32x{lanes}"))
    for row, count, total in zip(rows, counts, totals, strict=True):
        step = broadcast(x.scale(row, span, panel.span), lanes)
        part = broadcast(x.sum(row, span, panel.span), lanes)
        product = count.astype(f"float32x{lanes}") * step
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
