"""Experts with unquantized float32 weights: before quantization, and of layers that stay as they are.

Pairs are sorted by expert (`moqc.schedules.cpu.route`). Threads share the blocks of `lanes` rows, and each
multiplies its block of an expert with that expert's tokens, so weights are read once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from moqc.schedules.activations import activation_expr
from moqc.schedules.cpu.emit import Kernel, bind, int64, kernel, load, loop, store, symbol
from moqc.schedules.cpu.vector import (
    PARALLEL_WORK,
    block_product,
    common_lanes,
    parallel_if,
    spread,
    vector_type,
)


@dataclass(frozen=True)
class DenseExpertsShape:
    """What is fixed about an experts block; `operands` are the names of the weights there are."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    activation: str
    operands: tuple[str, ...]
    vector_lanes: int

    @property
    def lanes(self) -> int:
        """Rows of a block: both sizes are multiples."""
        return common_lanes(self.vector_lanes, self.hidden, self.intermediate)


def dense_up_kernel(shape: DenseExpertsShape) -> tirx.PrimFunc:
    """Build gate and up with the activation.

    Parameters of the PrimFunc: x float32 [T, H]; order, starts, active of `route_kernel`; as far as
    `shape.operands` has them gate, up [E, I, H], gate_bias, up_bias [E, I]; the output [P, I], a row a place
    of `order`.
    """
    rows, columns, lanes = shape.intermediate, shape.hidden, shape.lanes
    with kernel("dense_up", experts=shape.experts) as k:
        tokens = symbol("t")
        x = k.parameter("x", [tokens, columns], "float32")
        order, starts, active = _routing(k, shape, tokens)
        names = [name for name in ("gate", "up") if name in shape.operands]
        matrices = {name: k.parameter(name, [shape.experts, rows, columns], "float32") for name in names}
        biased = [name for name in names if f"{name}_bias" in shape.operands]
        biases = {name: k.parameter(f"{name}_bias", [shape.experts, rows], "float32") for name in biased}
        out = k.parameter("out", [tokens * shape.top_k, rows], "float32")

        def block(number: Any) -> None:
            row = bind(number * lanes)
            with _each_pair(starts, active) as (expert, place):
                token = bind(int64(load(order, [place])) // shape.top_k)
                sums = {}
                for name, matrix in matrices.items():
                    sums[name] = block_product(matrix, [expert], row, rows - 1, x, [token], (columns, lanes))
                    if name in biases:
                        sums[name] = bind(sums[name] + load(biases[name], [expert, row], vector_type(lanes)))
                store(out, [place, row], activation_expr(shape.activation, sums.get("gate"), sums["up"]))

        work = tokens * (shape.top_k * rows * columns * len(names))
        parallel_if(work > PARALLEL_WORK, rows // lanes, block)
    return k.finish()


def dense_down_kernel(shape: DenseExpertsShape) -> tirx.PrimFunc:
    """Build down and the weighted sum over a token's experts, which are added in rising order.

    Parameters of the PrimFunc: the output [P, I] of `dense_up_kernel`; order, starts, active; weights float32
    [T, top_k]; down [E, H, I]; down_bias [E, H] if `shape.operands` has it; the output float32 [T, H].
    """
    rows, columns, lanes = shape.hidden, shape.intermediate, shape.lanes
    kind = vector_type(lanes)
    with kernel("dense_down", experts=shape.experts) as k:
        tokens = symbol("t")
        inner = k.parameter("hidden", [tokens * shape.top_k, columns], "float32")
        order, starts, active = _routing(k, shape, tokens)
        weights = k.parameter("weights", [tokens, shape.top_k], "float32")
        down = k.parameter("down", [shape.experts, rows, columns], "float32")
        biased = "down_bias" in shape.operands
        bias = k.parameter("down_bias", [shape.experts, rows], "float32") if biased else None
        out = k.parameter("out", [tokens, rows], "float32")

        def block(number: Any) -> None:
            row = bind(number * lanes)
            with loop(0, tokens) as token:
                store(out, [token, row], spread(0.0, lanes))
            with _each_pair(starts, active) as (expert, place):
                pair = bind(int64(load(order, [place])))
                token = bind(pair // shape.top_k)
                value = block_product(down, [expert], row, rows - 1, inner, [place], (columns, lanes))
                if bias is not None:
                    value = value + load(bias, [expert, row], kind)
                weight = spread(load(weights, [token, pair % shape.top_k]), lanes)
                store(out, [token, row], load(out, [token, row], kind) + value * weight)

        parallel_if(tokens * (shape.top_k * rows * columns) > PARALLEL_WORK, rows // lanes, block)
    return k.finish()


def _routing(k: Kernel, shape: DenseExpertsShape, tokens: Any) -> tuple[Any, Any, Any]:
    """The outputs of `route_kernel` as parameters."""
    order = k.parameter("order", [tokens * shape.top_k], "int32")
    starts = k.parameter("starts", [shape.experts + 1], "int32")
    return order, starts, k.parameter("active", [shape.experts + 1], "int32")


@contextmanager
def _each_pair(starts: Any, active: Any) -> Iterator[tuple[Any, Any]]:
    """Loops over the experts hit and, of each, the places of its pairs in `order`."""
    with loop(0, load(active, [0])) as number:
        expert = bind(int64(load(active, [number + 1])))
        with loop(load(starts, [expert]), load(starts, [expert + 1])) as place:
            yield expert, place
