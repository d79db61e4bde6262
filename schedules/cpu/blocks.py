"""The loop every packed matrix product shares: one block of 16 rows times the rows of one expert (or of all).

Two ways, chosen at run time by the number of tokens:

* few: codes are unpacked in registers for each token (`row_product`); memory is the limit.
* `PANEL_TOKENS` or more, and always for float activations: the block is unpacked once into a panel that stays
  in the cache, and multiplied with several tokens at a time; 16 with AMX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import ROW_TILE
from moqc.schedules.cpu.amx import TILE_TOKENS, TileProducts, allow_tiles
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import Index, bind, int64, load, loop, scratch, store, when
from moqc.schedules.cpu.panel import Panel, fill_panel, panel_product
from moqc.schedules.cpu.tiles import Activations, Weights, row_product

PANEL_TOKENS = 4

Epilogue = Callable[[Any, int, list[Any]], None]
"""Called with (row of the activations, half of the block, one float32xL value a projection) to store them."""


@dataclass(frozen=True)
class Choice:
    """One projection of one expert: the bit classes it may be in, and at run time the class and the index."""

    classes: tuple[Weights, ...]
    selected: Any | None = None
    index: Any = 0

    def switch(self, body: Callable[[Weights], None]) -> None:
        """Emit `body` for each class under the condition that it is selected."""
        if len(self.classes) == 1:
            body(self.classes[0])
            return
        for number, weights in enumerate(self.classes):
            with when(self.selected == number):
                body(weights)

    @property
    def wide(self) -> bool:
        """Whether some class has values of more than 4 bits."""
        return any(weights.format.wide for weights in self.classes)


def start_products(family: DotFamily, x: Activations) -> None:
    """What a kernel does once before its threads multiply blocks."""
    if family.amx and x.quantized:
        allow_tiles()


def multiply_block(
    family: DotFamily,
    choices: Sequence[Choice],
    x: Activations,
    row_block: Index,
    rows: tuple[Any, Any],
    epilogue: Epilogue,
) -> None:
    """Multiply block `row_block` of every projection with the activations `rows[0] .. rows[1] - 1`."""
    begin, end = rows
    if not x.quantized:
        with when(begin < end):
            _by_panel(family, choices, x, row_block, rows, epilogue)
        return
    with T.If(end - begin < PANEL_TOKENS):
        with T.Then():
            _by_rows(family, choices, x, row_block, rows, epilogue)
        with T.Else():
            _by_panel(family, choices, x, row_block, rows, epilogue)


def _by_rows(
    family: DotFamily,
    choices: Sequence[Choice],
    x: Activations,
    row_block: Index,
    rows: tuple[Any, Any],
    epilogue: Epilogue,
) -> None:
    dtype = f"float32x{family.lanes}"
    with loop(*rows) as row:
        results = [[scratch(family.lanes) for _ in range(family.halves)] for _ in choices]
        for choice, result in zip(choices, results, strict=True):

            def product(weights: Weights, choice: Choice = choice, result: list[Any] = result) -> None:
                totals = row_product(family, weights.block(choice.index, row_block), x, row)
                for total, target in zip(totals, result, strict=True):
                    store(target, [0], load(total, [0], dtype))

            choice.switch(product)
        for half in range(family.halves):
            epilogue(row, half, [bind(load(result[half], [0], dtype)) for result in results])


def _by_panel(
    family: DotFamily,
    choices: Sequence[Choice],
    x: Activations,
    row_block: Index,
    rows: tuple[Any, Any],
    epilogue: Epilogue,
) -> None:
    begin, end = rows
    wide = any(choice.wide for choice in choices)
    classes = [weights for choice in choices for weights in choice.classes]
    panel = Panel.allocate(x.quantized, classes, len(choices))
    for slot, choice in enumerate(choices):

        def fill(weights: Weights, choice: Choice = choice, slot: int = slot) -> None:
            fill_panel(family, weights.block(choice.index, row_block), panel, slot, wide)

        choice.switch(fill)
    if family.amx and x.quantized:
        _by_tiles(panel, len(choices), x, rows, epilogue)
        return
    tile = family.token_tile
    whole = bind(T.truncdiv(end - begin, tile))
    with loop(0, whole) as step:
        _panel_tokens(family, len(choices), panel, x, begin + step * tile, tile, wide, epilogue)
    with loop(begin + whole * tile, end) as row:
        _panel_tokens(family, len(choices), panel, x, row, 1, wide, epilogue)


def _by_tiles(panel: Panel, count: int, x: Activations, rows: tuple[Any, Any], epilogue: Epilogue) -> None:
    """Multiply `TILE_TOKENS` rows at a time with all `count` slots of the panel."""
    begin, end = rows
    products = TileProducts(panel, count, x)
    products.configure()
    with loop(0, bind(T.truncdiv(end - begin + (TILE_TOKENS - 1), int64(TILE_TOKENS)))) as step:
        row = bind(begin + step * TILE_TOKENS)
        tokens = bind(tirx.min(end - row, int64(TILE_TOKENS)))
        products.multiply(row)
        with loop(0, tokens) as m:
            epilogue(row + m, 0, [bind(products.result(slot, m)) for slot in range(count)])
    products.release()


def _panel_tokens(
    family: DotFamily,
    count: int,
    panel: Panel,
    x: Activations,
    row: Any,
    tokens: int,
    wide: bool,
    epilogue: Epilogue,
) -> None:
    """Multiply `tokens` rows from `row` on with every slot of the panel, and finish them."""
    slots = [panel_product(family, panel, slot, x, row, tokens, wide) for slot in range(count)]
    for m in range(tokens):
        for half in range(family.halves):
            values = [bind(load(slot[m][half], [0], f"float32x{family.lanes}")) for slot in slots]
            epilogue(row + m, half, values)


def load_rows(family: DotFamily, vector: Any, lead: Sequence[Index], row: Any, rows: int) -> Any:
    """Elements `row ..` of the last axis (length `rows`) as float32xL; those past the end are 0."""
    if rows % ROW_TILE == 0:
        return load(vector, [*lead, row], f"float32x{family.lanes}")
    padded = scratch(family.lanes)
    for lane in range(family.lanes):
        store(padded, [lane], T.float32(0))
        with when(row + lane < rows):
            store(padded, [lane], load(vector, [*lead, row + lane]))
    return bind(load(padded, [0], f"float32x{family.lanes}"))


def store_rows(
    family: DotFamily, tensor: Any, lead: Sequence[Index], row: Any, rows: int, value: Any
) -> None:
    """Write float32xL `value` to elements `row ..` of the last axis, leaving out those past its end."""
    if rows % ROW_TILE == 0:
        store(tensor, [*lead, row], value)
        return
    spill = scratch(family.lanes)
    store(spill, [0], value)
    for lane in range(family.lanes):
        with when(row + lane < rows):
            store(tensor, [*lead, row + lane], load(spill, [lane]))
