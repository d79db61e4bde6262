"""Experts that an ONNX graph spells out behind a TopK, in whatever operators.

A block is a part of the graph that three tensors determine, tokens [T, H], the TopK's indices [T, k] and
their weights [T, k], and that has one result [T, H]. Where that is the case is found by following tensors;
what happens inside does not matter: matrices gathered by the indices, all experts for all tokens with the
result masked, tokens gathered for each expert and scattered back, also behind If. What the block computes is
found out by running it beside moqc's reference (`moqc.frontend.onnx.forms`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from moqc.errors import ModelError
from moqc.frontend.onnx.experts import OnnxExperts
from moqc.frontend.onnx.flow import MISFITS, Array, Flow, Step
from moqc.frontend.onnx.forms import NONE_KNOWN, Form, identify
from moqc.frontend.onnx.products import Product, find_products, read_mlps
from moqc.frontend.onnx.reader import OnnxModel
from moqc.ir.calls import PROJECTIONS
from moqc.log import logger
from moqc.quant.tensor import Quantized

_DRAWS = 64
_FEW, _MANY = 4, 32  # tokens that a block is tried with: gathered matrices are copied for each of them
_JOINS = 8  # results that are tried behind a TopK: its block's comes before any other layer's


@dataclass(frozen=True)
class PlainBlock:
    """A block, the node whose result is the block's, and a node that has to come before it."""

    experts: OnnxExperts
    last: onnx.NodeProto
    before: onnx.NodeProto | None = None


@dataclass(frozen=True)
class _Bounds:
    """A part of the graph: `steps` make `result` of x, and of ids and weights or of a table [T, E]."""

    result: Step
    x: str
    ids: str
    weights: str
    steps: list[Step]
    is_table: bool = False


def take_plain(model: OnnxModel) -> tuple[list[PlainBlock], list[str]]:
    """The spelled-out blocks of a graph; and for every TopK that has none, what was looked for and missed.

    Raises ModelError for a block that is recognized and is none that moqc computes.
    """
    if all(node.op_type != "TopK" for node in model.graph.node):
        return [], ["a TopK: there is none"]
    flow = Flow(model)
    found, missing, routers = [], [], set[str]()
    for top in reversed([step for step in flow.steps if step.kind == "TopK" and not step.inside]):
        if routers & set(top.outputs):
            continue  # chooses groups of experts, for the TopK behind it
        search = _Search(flow, top)
        block = search.block()
        if block is None:
            missing.append(f"behind the TopK {top.outputs[-1]} {search.missing}")
        else:
            found.append(block)
            routers |= flow.above(top.inputs[0])
    if found:
        for what in missing:
            logger.warning("%s: no experts %s", model.path, what)
    return found[::-1], missing[::-1]


class _Search:
    """Looks for the block behind one TopK. `missing` says what was not there."""

    def __init__(self, flow: Flow, top: Step) -> None:
        self._flow, self._top = flow, top
        self._ids = top.outputs[-1]
        self._rank = flow.rank(self._ids)
        self._router = flow.above(self._ids)
        self._count = 0
        self.missing = "one tensor in which all that depends on it comes together"

    def block(self) -> PlainBlock | None:
        """The block. Raises ModelError where there is one that moqc does not compute."""
        if self._top.inputs[1] not in self._flow.constant or len(self._top.outputs) != 2:
            self.missing = "indices of a stored number of experts"
            return None
        self._count = int(self._flow.value(self._top.inputs[1]).reshape(-1)[0])
        if self._rank < 2:
            self.missing = "indices of the shape [tokens, k]"
            return None
        refused = ""
        for bounds in self._bounds():
            self.missing = "products with stored matrices"
            products = find_products(self._flow, bounds.steps)
            if not products:
                continue
            form = self._form(bounds, products)
            if isinstance(form, Form):
                return self._made(bounds, form)
            refused = refused or form
        if refused:
            raise ModelError(
                f"{self._flow.model.path}: the indices {self._ids} of a TopK look like those of experts, but "
                f"{refused}; export the block as a com.microsoft MoE or QMoE node, or give moqc the "
                "checkpoint itself"
            )
        return None

    def _bounds(self) -> Iterator[_Bounds]:
        """Parts of the graph that may be the block: those nearest to the TopK first, and the smallest."""
        flow = self._flow
        joins = [
            step
            for step in flow.joins(self._top)
            if flow.rank(step.outputs[0]) == self._rank and flow.is_float(step.outputs[0])
        ]
        for result in joins[:_JOINS]:
            self.missing = "a part of the graph that tokens, experts and their weights determine"
            before = {name for step in flow.steps[: flow.steps.index(result)] for name in step.outputs}
            weights = [name for name in reversed(self._routed()) if name in before]
            tables = [step.outputs[0] for step in joins if step.outputs[0] in before]
            for name, is_table in [*((n, False) for n in weights), *((n, True) for n in reversed(tables))]:
                given = [name] if is_table else [name, self._ids]
                for x, steps in flow.cuts(result.outputs, given):
                    if any(self._router.intersection(step.outputs) for step in steps):
                        break  # what follows takes the router in as well
                    if flow.rank(x) == self._rank and flow.is_float(x):
                        yield _Bounds(result, x, self._ids, name, steps, is_table)

    def _routed(self) -> list[str]:
        """Tensors that may hold the weights of the chosen experts: floats that depend on the TopK."""
        flow, spread, found = self._flow, {self._ids}, list[str]()
        for step in flow.steps:
            if step is self._top or spread.intersection(step.inputs):
                spread.update(step.outputs)
                found += [] if step.inside else step.outputs
        alike = [name for name in found if flow.is_float(name) and flow.rank(name) == self._rank]
        return [name for name in alike if flow.columns(name) in (None, self._count)]

    def _form(self, bounds: _Bounds, products: list[Product]) -> Form | str:
        """What the block computes, or why it is none."""
        flow = self._flow
        mlps = read_mlps(flow, products)
        if mlps is None:
            return f"{len(products)} stored matrices behind them do not form equal MLPs of two or three"
        if not flow.is_float(bounds.x, (TensorProto.FLOAT,)):
            return f"{bounds.x} is not in float32, the precision that moqc compares blocks in"
        if bounds.is_table and not self._is_sparse(bounds.weights, mlps.experts):
            return f"{bounds.weights}, the weights of all experts, is not 0 for those that they do not choose"

        def evaluate(x: Array, ids: Array, weights: Array) -> Array | None:
            given = {bounds.x: x, bounds.ids: ids, bounds.weights: weights}
            if bounds.is_table:
                table = np.zeros((len(x), mlps.experts), np.float32)
                np.put_along_axis(table, ids, weights, axis=1)
                given = {bounds.x: x, bounds.weights: table}
            return self._run(given, bounds.result.outputs[0])

        tokens = flow.tokens(bounds.x, _FEW if mlps.stacked else max(_MANY, mlps.experts))
        return identify(evaluate, mlps, tokens, self._count) or "what their block computes is " + NONE_KNOWN

    def _run(self, given: dict[str, Array], result: str) -> Array | None:
        """`result` [T, .] for values of T rows; None where it takes others."""
        shaped = {
            name: value.reshape(*self._flow.shape(name, len(value)), value.shape[-1])
            for name, value in given.items()
        }
        try:
            (found,) = self._flow.run(shaped, [result])
        except MISFITS:
            return None
        return found.reshape(-1, found.shape[-1])

    def _is_sparse(self, table: str, experts: int) -> bool:
        """Whether a tensor [T, E] is 0 but for the chosen experts, on random scores."""
        for scores, _ in self._flow.cuts((table, self._ids), ()):
            if self._flow.rank(scores) != self._rank:
                continue
            rows = self._flow.tokens(scores, _DRAWS)
            drawn = np.random.default_rng(0).normal(size=(rows, experts)).astype(np.float32)
            shape = (*self._flow.shape(scores, rows), experts)
            try:
                values, ids = self._flow.run({scores: drawn.reshape(shape)}, [table, self._ids])
                np.put_along_axis(values, ids, 0, axis=-1)
            except MISFITS:
                return False
            return values.shape == shape and not values.any()
        return False

    def _made(self, bounds: _Bounds, form: Form) -> PlainBlock:
        node, weights, before = bounds.result.node, bounds.weights, None
        if bounds.is_table:
            weights = f"{bounds.weights}_chosen"
            before = helper.make_node("GatherElements", [bounds.weights, bounds.ids], [weights], axis=-1)
        operands, inputs = form.operands, (bounds.x, bounds.ids, weights)
        stored: dict[str, torch.Tensor | Quantized] = {n: operands[n] for n in PROJECTIONS if n in operands}
        biases = {bias: operands[bias] for name in stored if (bias := f"{name}_bias") in operands}
        experts = OnnxExperts(node.output[0], inputs, form.activation, None, stored, biases)
        return PlainBlock(experts, node, before)
