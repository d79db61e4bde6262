"""The loop every packed matrix product shares: one block of 16 rows times the rows of one expert (or of all).

Two ways, chosen at run time by the number of tokens:

* few: codes are unpacked in registers for some tokens at a time (`row_products`); memory is the limit.
* ``plans.several.least`` or more, and always for float activations: the block is unpacked once into a panel
  that stays in the cache, and multiplied with several tokens at a time. With AMX in batches of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE
from moqc.schedules.cpu.amx import SLOTS, TILE_COLUMNS, TILE_TOKENS, TileProducts, allow_tiles
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import Index, bind, int64, load, loop, scratch, store, when
from moqc.schedules.cpu.panel import Panel, fill_panel, panel_product
from moqc.schedules.cpu.plan import Plans
from moqc.schedules.cpu.tiles import Activations, Weights, row_products

Epilogue = Callable[[Any, Any, int, list[Any]], None]
"""Called with (row of the activations, row block, half of it, float32xL values by projection) to store."""


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


def blocks_together(family: DotFamily, projections: int) -> int:
    """How many row blocks a product of so many projections takes at a time, for many tokens."""
    return max(1, SLOTS // projections) if family.amx else 1


@dataclass(frozen=True)
class Product:
    """Row blocks ``blocks[0] .. blocks[1] - 1`` of all projections times rows of activations, by `plans`."""

    family: DotFamily
    choices: Sequence[Choice]
    x: Activations
    blocks: tuple[Index, Index]
    epilogue: Epilogue
    plans: Plans

    def multiply(self, begin: Any, end: Any) -> None:
        """Multiply the activations ``begin .. end - 1``."""
        if not self.x.quantized:
            with when(begin < end), loop(*self.blocks) as block:
                self._by_panel(block, begin, end)
            return
        with T.If(end - begin < self.plans.several.least):
            with T.Then(), loop(*self.blocks) as block:
                most = self.plans.several.rows
                _by_halves(begin, end, most, lambda row, tokens: self._rows_products(block, row, tokens))
            with T.Else():
                if self.family.amx:
                    self._by_tiles(begin, end)
                else:
                    with loop(*self.blocks) as block:
                        self._by_panel(block, begin, end)

    def _rows_products(self, row_block: Any, row: Any, tokens: int) -> None:
        """Multiply `tokens` rows from `row` on with every projection, and finish them."""
        family, x = self.family, self.x
        dtype = f"float32x{family.lanes}"
        places = [(m, half) for m in range(tokens) for half in range(family.halves)]
        results = [{place: scratch(family.lanes) for place in places} for _ in self.choices]
        for choice, result in zip(self.choices, results, strict=True):

            def product(weights: Weights, choice: Choice = choice, result: dict[Any, Any] = result) -> None:
                block = weights.block(choice.index, row_block)
                totals = row_products(family, block, x, [row + m for m in range(tokens)], self.plans.few)
                for (m, half), target in result.items():
                    store(target, [0], load(totals[m][half], [0], dtype))

            choice.switch(product)
        for m, half in places:
            values = [bind(load(result[m, half], [0], dtype)) for result in results]
            self.epilogue(row + m, row_block, half, values)

    @property
    def _wide(self) -> bool:
        return any(choice.wide for choice in self.choices)

    def _panel(self, slots: int, capacity: int | None = None, signed: bool = False) -> Panel:
        classes = [weights for choice in self.choices for weights in choice.classes]
        return Panel.allocate(self.x.quantized, classes, slots, capacity, signed)

    def _fill(self, panel: Panel, slot: int, choice: Choice, row_block: Any, first: Index) -> None:
        """Unpack a projection's block into a slot of the panel."""
        choice.switch(
            lambda weights: fill_panel(
                self.family, weights.block(choice.index, row_block), panel, slot, self._wide, first
            )
        )

    def _by_panel(self, row_block: Any, begin: Any, end: Any) -> None:
        panel, tile = self._panel(len(self.choices)), self.family.token_tile
        for slot, choice in enumerate(self.choices):
            self._fill(panel, slot, choice, row_block, 0)
        _by_halves(begin, end, tile, lambda row, count: self._panel_tokens(panel, row_block, row, count))

    def _panel_tokens(self, panel: Panel, row_block: Any, row: Any, tokens: int) -> None:
        """Multiply `tokens` rows from `row` on with every slot of the panel, and finish them."""
        family = self.family
        slots = [
            panel_product(family, panel, slot, self.x, row, tokens, self._wide)
            for slot in range(len(self.choices))
        ]
        for m in range(tokens):
            for half in range(family.halves):
                values = [bind(load(slot[m][half], [0], f"float32x{family.lanes}")) for slot in slots]
                self.epilogue(row + m, row_block, half, values)

    def _by_tiles(self, begin: Any, end: Any) -> None:
        """Multiply `blocks_together` row blocks of all projections with tiles of `TILE_TOKENS` rows."""
        together = blocks_together(self.family, len(self.choices))
        first, last = map(int64, self.blocks)
        capacity = self.plans.many.batch * (TILE_COLUMNS // COLUMN_TILE)
        panel = self._panel(len(self.choices) * together, capacity, signed=True)
        products = TileProducts(panel, len(self.choices) * together, self.x, self.plans.many)
        products.configure()
        with loop(0, bind(T.truncdiv(last - first + (together - 1), int64(together)))) as group:
            row_block = bind(first + group * together)
            # Past the last one that is done again, to be thrown away.
            blocks = [row_block, *(bind(tirx.min(row_block + b, last - 1)) for b in range(1, together))]
            self._tiles_of_blocks(products, panel, blocks, begin, end)
        products.release()

    def _tiles_of_blocks(
        self, products: TileProducts, panel: Panel, blocks: list[Any], begin: Any, end: Any
    ) -> None:
        plan, count = self.plans.many, len(self.choices)
        slots = [(choice, block) for block in blocks for choice in self.choices]
        most = plan.many * TILE_TOKENS

        def fill(slot: int, first: Any) -> None:
            self._fill(panel, slot, *slots[slot], first)

        def ask(slot: int, span: Any) -> None:
            choice, row_block = slots[slot]

            def ahead(weights: Weights) -> None:
                block = weights.block(choice.index, row_block)
                for t in range(panel.span):
                    block.prefetch(span * panel.span + t, plan.ahead, rows=len(blocks))

            choice.switch(ahead)

        with loop(0, bind(T.truncdiv(end - begin + (most - 1), int64(most)))) as step:
            row = bind(begin + step * most)
            left = bind(tirx.min(end - row, int64(most)))
            tiles = bind(T.truncdiv(left + (TILE_TOKENS - 1), int64(TILE_TOKENS)))
            products.multiply(row, tiles, fill, ask)
            for number, row_block in enumerate(blocks):
                new = row_block > blocks[number - 1] if number else tirx.const(True)
                with when(new), loop(0, left) as m:
                    tile, place = T.truncdiv(m, int64(TILE_TOKENS)), T.truncmod(m, int64(TILE_TOKENS))
                    results = [products.result(number * count + slot, tile, place) for slot in range(count)]
                    self.epilogue(row + m, row_block, 0, [bind(result) for result in results])


def _by_halves(begin: Any, end: Any, most: int, multiply: Callable[[Any, int], None]) -> None:
    """Emit ``multiply(row, tokens)`` for `most` rows at a time, then for half as many, down to one."""
    while most:
        whole = bind(begin + T.truncdiv(end - begin, int64(most)) * most)
        with loop(0, T.truncdiv(whole - begin, int64(most))) as step:
            multiply(bind(begin + step * most), most)
        begin, most = whole, most // 2


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
