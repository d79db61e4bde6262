"""The two products of an experts block with packed weights, every bit class of a layer in one kernel each.

Rows of activations are (token, expert) pairs in the order of `route`. Work is cut by chunks of row blocks
first, then by expert: an expert with many tokens is spread over the threads, and a chunk's weights are read
as one stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from moqc.quant.formats import COLUMN_TILE, ROW_TILE, Format
from moqc.schedules.activations import activation_expr
from moqc.schedules.cpu.blocks import Choice, Product, load_rows, start_products, store_rows
from moqc.schedules.cpu.dot import DotFamily
from moqc.schedules.cpu.emit import (
    Kernel,
    bind,
    broadcast,
    ceildiv,
    int64,
    kernel,
    load,
    loop,
    parallel,
    splat,
    store,
    symbol,
    when,
)
from moqc.schedules.cpu.plan import Plans
from moqc.schedules.cpu.tiles import Activations, Weights
from moqc.schedules.experts import ExpertsLayer


@dataclass(frozen=True)
class ExpertsShape(ExpertsLayer):
    """A layer with `inputs` columns of gate and up, whose activations come in `mode`.

    `rotated` blocks of 32 columns of the hidden tensor are rotated between the two kernels.
    """

    inputs: int = field(kw_only=True)
    mode: str = field(kw_only=True)
    rotated: int = 0

    @property
    def padded_intermediate(self) -> int:
        """Columns of the hidden tensor between the two kernels."""
        return ceildiv(self.intermediate, COLUMN_TILE) * COLUMN_TILE


@dataclass(frozen=True)
class _Routing:
    """The outputs of `route` and the table expert -> (class, index), as parameters."""

    starts: Any
    active: Any
    table: Any

    @classmethod
    def declare(cls, k: Kernel, experts: int) -> _Routing:
        return cls(
            k.parameter("starts", [experts + 1], "int32"),
            k.parameter("active", [experts + 1], "int32"),
            k.parameter("table", [3, experts, 2], "int32"),
        )

    def expert(self, number: Any) -> Any:
        """The `number`-th expert hit."""
        return bind(load(self.active, [int64(number) + 1]).astype("int64"))

    def rows(self, expert: Any) -> tuple[Any, Any]:
        """Its range of pairs."""
        bounds = [load(self.starts, [expert + offset]).astype("int64") for offset in (0, 1)]
        return bind(bounds[0]), bind(bounds[1])

    def choice(self, projection: int, expert: Any, classes: tuple[Weights, ...]) -> Choice:
        """Where its matrix of a projection (0 gate, 1 up, 2 down) is."""
        selected, index = (bind(load(self.table, [projection, expert, column])) for column in (0, 1))
        return Choice(classes, selected, bind(index.astype("int64")))


def _declare_classes(
    k: Kernel, name: str, formats: Sequence[Format], rows: int, columns: int
) -> tuple[Weights, ...]:
    """Parameters of the stacked classes of a projection, each with a symbolic count of matrices."""
    return tuple(
        Weights.declare(
            k, f"{name}_{number}_", fmt, ceildiv(rows, ROW_TILE), columns, symbol(f"{name}_{number}")
        )
        for number, fmt in enumerate(formats)
    )


def _facts(shape: ExpertsShape, family: DotFamily, plans: Plans, *projections: str) -> dict[str, Any]:
    classes = [f"{name}:{fmt}" for name in projections for fmt in getattr(shape, name)]
    return {"classes": classes, "activations": shape.mode, "dot": family.name, **plans.facts}


def gate_up_kernel(family: DotFamily, shape: ExpertsShape, plans: Plans) -> tirx.PrimFunc:
    """Build the first product with its activation function.

    Parameters of the PrimFunc: the activations (P rows of `inputs`, and spare ones), starts, active, table,
    the classes of gate, then of up, gate_bias and up_bias ``[E, I]`` if there, and the output float32
    ``[P, padded I]``.
    """
    intermediate = shape.intermediate
    blocks = ceildiv(intermediate, ROW_TILE)
    facts = _facts(shape, family, plans, "gate", "up")
    with kernel("gate_up", activation=shape.activation, **facts) as k:
        pairs = symbol("p")
        x = Activations.declare(k, shape.mode, symbol("rows"), shape.inputs)
        routing = _Routing.declare(k, shape.experts)
        gate, up = (
            _declare_classes(k, name, getattr(shape, name), intermediate, shape.inputs)
            for name in ("gate", "up")
        )
        biases = {
            name: k.parameter(f"{name}_bias", [shape.experts, intermediate], "float32")
            for name in ("gate", "up")
            if f"{name}_bias" in shape.biases
        }
        hidden = k.parameter("hidden", [pairs, shape.padded_intermediate], "float32")
        hit = bind(load(routing.active, [0]).astype("int64"))
        start_products(family, x)
        chunks = _Chunks(blocks, hit, pairs, plans, parts=hit)
        with parallel(hit * chunks.count) as item:
            expert = routing.expert(T.truncmod(item, hit))
            choices = [routing.choice(0, expert, gate)] if gate else []
            choices.append(routing.choice(1, expert, up))
            rows = routing.rows(expert)

            def finish(pair: Any, row_block: Any, half: int, values: list[Any]) -> None:
                row = row_block * ROW_TILE + half * family.lanes
                named = dict(zip(("gate", "up") if gate else ("up",), values, strict=True))
                for name, bias in biases.items():
                    offset = load_rows(family, bias, [expert], row, intermediate)
                    named[name] = bind(named[name] + offset)
                value = activation_expr(shape.activation, named.get("gate"), named["up"])
                store(hidden, [pair, row], value)
                _clear_padding(family, shape, hidden, pair, row, row_block, blocks)

            of_chunk = chunks.blocks(T.truncdiv(item, hit))
            Product(family, choices, x, of_chunk, finish, plans).multiply(*rows)
    return k.finish()


def _clear_padding(
    family: DotFamily, shape: ExpertsShape, hidden: Any, pair: Any, row: Any, row_block: Any, blocks: int
) -> None:
    """The last of an odd number of row blocks also writes the 16 columns of padding after it."""
    if blocks * ROW_TILE < shape.padded_intermediate:
        with when(row_block == blocks - 1):
            store(hidden, [pair, row + ROW_TILE], splat(0, family.lanes))


class _Chunks:
    """How `blocks` row blocks are shared by the tasks of the plan, which each takes some of `parts` experts.

    For so many `pairs` of tokens with one of `hit` experts the plan for many or for few tokens holds.
    """

    def __init__(self, blocks: int, hit: Any, pairs: Any, plans: Plans, parts: Any = 1) -> None:
        several = pairs >= hit * plans.several.least
        a_thread = tirx.if_then_else(several, int64(plans.many.tasks), int64(plans.few.tasks))
        tasks = bind(a_thread * int64(T.call_packed("runtime.NumThreads")))
        wanted = bind(tirx.max(T.truncdiv(parts * blocks + (tasks - 1), tasks), int64(1)))
        self._blocks = blocks
        # As many chunks as that size gives, but of equal size: threads take equal numbers of them.
        chunks = bind(T.truncdiv(blocks + (wanted - 1), wanted))
        self._size = bind(T.truncdiv(blocks + (chunks - 1), chunks))
        self.count = bind(T.truncdiv(blocks + (self._size - 1), self._size))

    def blocks(self, number: Any) -> tuple[Any, Any]:
        """The first row block of chunk `number`, and the one after its last."""
        first = bind(number * self._size)
        return first, bind(tirx.min(first + self._size, int64(self._blocks)))


def down_kernel(family: DotFamily, shape: ExpertsShape, plans: Plans) -> tirx.PrimFunc:
    """Build the second product with the weighted sum over a token's experts.

    Parameters of the PrimFunc: the activations (P rows of `intermediate`, and spare ones), starts, active,
    table, order int32 [P], weights float32 ``[T, top_k]``, the classes of down, down_bias ``[E, H]`` if
    there, and the output float32 ``[T, H]``.
    A token's experts are added in rising order, whatever the number of threads.
    """
    blocks = ceildiv(shape.hidden, ROW_TILE)
    with kernel("down", **_facts(shape, family, plans, "down")) as k:
        pairs, tokens = symbol("p"), symbol("t")
        x = Activations.declare(k, shape.mode, symbol("rows"), shape.intermediate)
        routing = _Routing.declare(k, shape.experts)
        order = k.parameter("order", [pairs], "int32")
        shares = k.parameter("weights", [tokens, shape.top_k], "float32")
        down = _declare_classes(k, "down", shape.down, shape.hidden, shape.intermediate)
        bias = None
        if "down_bias" in shape.biases:
            bias = k.parameter("down_bias", [shape.experts, shape.hidden], "float32")
        y = k.parameter("y", [tokens, shape.hidden], "float32")
        start_products(family, x)
        hit = bind(load(routing.active, [0]).astype("int64"))
        chunks = _Chunks(blocks, hit, pairs, plans)
        with parallel(chunks.count) as chunk:
            _clear(family, y, tokens, chunks, chunk, shape.hidden)
            with loop(0, hit) as number:
                expert = routing.expert(number)
                choices = [routing.choice(2, expert, down)]
                rows = routing.rows(expert)

                def finish(
                    pair: Any, row_block: Any, half: int, values: list[Any], expert: Any = expert
                ) -> None:
                    row = row_block * ROW_TILE + half * family.lanes
                    flat = bind(load(order, [pair]).astype("int64"))
                    token = bind(T.truncdiv(flat, int64(shape.top_k)))
                    share = load(shares, [token, T.truncmod(flat, int64(shape.top_k))])
                    value = values[0]
                    if bias is not None:
                        value = value + load_rows(family, bias, [expert], row, shape.hidden)
                    value = value * broadcast(share, family.lanes)
                    before = load_rows(family, y, [token], row, shape.hidden)
                    store_rows(family, y, [token], row, shape.hidden, before + value)

                Product(family, choices, x, chunks.blocks(chunk), finish, plans).multiply(*rows)
    return k.finish()


def _clear(family: DotFamily, y: Any, tokens: Any, chunks: _Chunks, chunk: Any, rows: int) -> None:
    """Set the columns of `chunk` to 0 for every token."""
    blocks = chunks.blocks(chunk)
    with loop(0, tokens) as token, loop(*blocks) as row_block:
        for half in range(family.halves):
            row = row_block * ROW_TILE + half * family.lanes
            store_rows(family, y, [token], row, rows, splat(0, family.lanes))
