"""Experts that an ONNX graph spells out: matrices gathered by the result of a TopK.

torch.onnx writes a block of transformers so ("batched_mm"): the matrices [E, N, K] of the chosen experts are
gathered, multiplied with every token's row, weighted and summed. What is looked for is only where such a
block begins and ends. What it computes, and how its matrices lie, is then found out by running it beside
moqc's reference: a block that equals none of the known forms is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from moqc.errors import ModelError
from moqc.frontend.onnx.experts import OnnxExperts
from moqc.frontend.onnx.reader import OnnxModel
from moqc.quant import reference
from moqc.quant.tensor import Quantized

LOOKED_FOR = "matrices [experts, rows, columns] that a TopK's indices gather"
_SHAPING = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Expand", "Flatten", "Cast", "Identity", "Tile"})
_ONWARD = _SHAPING | {"Mul", "Add"}
_GATED = ("silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu")
_UNGATED = ("silu", "gelu", "relu2")
_ORDER = ("gate", "up", "down")
_TOKENS = 5
_TOLERANCE = 1e-5

Array = NDArray[Any]


def take_plain(model: OnnxModel) -> list[tuple[onnx.NodeProto, OnnxExperts]]:
    """The spelled-out blocks of a graph, each with the last of its nodes, whose result is the block's.

    Raises ModelError for a block that is recognized and is none that moqc computes.
    """
    graph = _Graph(model)
    return [graph.block(chosen, gathers) for chosen, gathers in graph.gathered().items()]


class _Graph:
    """The graph with who makes and who uses what."""

    def __init__(self, model: OnnxModel) -> None:
        self._model = model
        self._makers = {name: node for node in model.graph.node for name in node.output if name}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._ranks: dict[str, int] = {}

    def gathered(self) -> dict[str, list[onnx.NodeProto]]:
        """Indices of a TopK -> the nodes that gather weights of at least two dimensions by them."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self._model.graph.node:
            stored = node.op_type in ("Gather", "GatherND") and self._model.weights.get(node.input[0])
            if stored and len(stored.dims) >= 2:
                chosen = self._source(node.input[1])
                maker = self._makers.get(chosen)
                if maker is not None and maker.op_type == "TopK" and chosen == maker.output[1]:
                    found.setdefault(chosen, []).append(node)
        return {chosen: nodes for chosen, nodes in found.items() if any(map(self._is_matrix, nodes))}

    def block(self, chosen: str, gathers: list[onnx.NodeProto]) -> tuple[onnx.NodeProto, OnnxExperts]:
        """The block whose experts `chosen` gives, [T, k]."""
        gathers = sorted(gathers, key=self._is_matrix, reverse=True)  # biases behind
        matrices = [node for node in gathers if self._is_matrix(node)]
        if len(matrices) != 2 or len(gathers) not in (2, 4):
            raise self._refuse(chosen, f"gather {len(gathers)} stacked weights, not a block's two or four")
        first, second = (self._product(node, chosen) for node in matrices)
        x = self._flat(next(name for name in first.input if name != matrices[0].output[0]), chosen)
        last, weights = self._end(second, chosen)
        if self._rank(chosen) != 2 or self._rank(weights) != 2:
            raise self._refuse(chosen, "or their weights are not of the shape [tokens, k]")
        arrays = [self._model.array(node.input[0]).astype(np.float32) for node in gathers]
        inputs = (x, chosen, weights)
        activation, operands = self._identify(inputs, last.output[0], arrays)
        stored: dict[str, torch.Tensor | Quantized] = {n: operands[n] for n in _ORDER if n in operands}
        biases = {f"{n}_bias": operands[f"{n}_bias"] for n in stored if f"{n}_bias" in operands}
        return last, OnnxExperts(last.output[0], inputs, activation, None, stored, biases)

    def _is_matrix(self, node: onnx.NodeProto) -> bool:
        return len(self._model.weights[node.input[0]].dims) == 3

    def _refuse(self, chosen: str, what: str) -> ModelError:
        return ModelError(
            f"{self._model.path}: the indices {chosen} of a TopK look like those of experts, but {what}; "
            "export the block as a com.microsoft MoE or QMoE node, or give moqc the checkpoint itself"
        )

    def _source(self, name: str) -> str:
        """What `name` is another shape of."""
        while (node := self._makers.get(name)) is not None and node.op_type in _SHAPING:
            name = node.input[0]
        return name

    def _product(self, gather: onnx.NodeProto, chosen: str) -> onnx.NodeProto:
        users = self._users.get(gather.output[0], [])
        if len(users) != 1 or users[0].op_type != "MatMul":
            raise self._refuse(chosen, f"{gather.input[0]} goes into {[node.op_type for node in users]}")
        return users[0]

    def _flat(self, name: str, chosen: str) -> str:
        """The tensor [T, H] that `name` repeats."""
        found = ""
        while True:
            found = name if self._rank(name) == 2 else found
            node = self._makers.get(name)
            if node is None or node.op_type not in _SHAPING:
                break
            name = node.input[0]
        if not found:
            raise self._refuse(chosen, "their input is not of the shape [tokens, hidden]")
        return found

    def _end(self, node: onnx.NodeProto, chosen: str) -> tuple[onnx.NodeProto, str]:
        """The sum over the experts of a token, and the routing weights, from the last product on."""
        weights = ""
        while node.op_type != "ReduceSum":
            users = self._users.get(node.output[0], [])
            if len(users) != 1 or users[0].op_type not in _ONWARD | {"ReduceSum"}:
                raise self._refuse(chosen, f"what they multiply goes into {[n.op_type for n in users]}")
            if users[0].op_type == "Mul":
                weights = next(name for name in users[0].input if name != node.output[0])
            node = users[0]
        return node, self._source(weights) if weights else weights

    def _rank(self, name: str) -> int:
        if not self._ranks:
            whole = helper.make_model(
                self._model.graph, opset_imports=[helper.make_opsetid("", self._model.opset)]
            )
            graph = shape_inference.infer_shapes(whole).graph
            for value in (*graph.value_info, *graph.input, *graph.output):
                if value.type.tensor_type.HasField("shape"):
                    self._ranks[value.name] = len(value.type.tensor_type.shape.dim)
        return self._ranks.get(name, -1)

    def _identify(
        self, inputs: tuple[str, str, str], result: str, arrays: list[Array]
    ) -> tuple[str, dict[str, torch.Tensor]]:
        """The activation and the canonical operands with which the reference gives what the nodes give."""
        generator = np.random.default_rng(0)
        experts, k = arrays[0].shape[0], self._top(inputs[1])
        hidden = [size for size in arrays[1].shape[1:] if size in arrays[0].shape[1:]]
        for width in dict.fromkeys(hidden):
            x = generator.normal(size=(_TOKENS, width)).astype(np.float32)
            ids = np.stack([generator.permutation(experts)[:k] for _ in range(_TOKENS)])
            weights = generator.uniform(0.1, 1, ids.shape).astype(np.float32)
            values = x, ids, weights
            expected = self._run(inputs, result, values)
            if expected is None or expected.shape != x.shape:
                continue
            for activation, operands in _forms(arrays, width):
                found = reference.experts(
                    *map(torch.from_numpy, values),
                    **{"gate": None, **operands},  # type: ignore[arg-type]
                    activation=activation,
                ).numpy()
                if np.linalg.norm(found - expected) <= _TOLERANCE * np.linalg.norm(expected):
                    return activation, operands
        raise self._refuse(inputs[1], "what their block computes is no activation and layout that moqc knows")

    def _top(self, chosen: str) -> int:
        """How many experts a token takes: the second input of the TopK."""
        count = self._makers[chosen].input[1]
        maker = self._makers.get(count)
        if maker is not None and maker.op_type == "Constant":
            stored = numpy_helper.to_array(maker.attribute[0].t)
        elif count in self._model.weights:
            stored = self._model.array(count)
        else:
            raise self._refuse(chosen, "their number is computed")
        return int(stored.reshape(-1)[0])

    def _run(self, inputs: tuple[str, ...], result: str, values: tuple[Array, ...]) -> Array | None:
        """`result` for `values` of `inputs`; None where it takes more than these."""
        nodes = self._between(inputs, result)
        if nodes is None:
            return None
        needed = {name for node in nodes for name in node.input} & self._model.weights.keys()
        graph = helper.make_graph(
            nodes,
            "block",
            [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
                for name, value in zip(inputs, values, strict=True)
            ],
            [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(self._model.array(name), name) for name in needed],
        )
        whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._model.opset)])
        try:
            found: Any = ReferenceEvaluator(whole).run(None, dict(zip(inputs, values, strict=True)))
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None  # of another width
        return np.asarray(found[0])

    def _between(self, inputs: tuple[str, ...], result: str) -> list[onnx.NodeProto] | None:
        """The nodes that make `result` of `inputs`, in order; None where they take something else."""
        wanted, names = {result}, [result]
        while names:
            name = names.pop()
            if name in inputs or name in self._model.weights or not name:
                continue
            if name not in self._makers:
                return None
            new = set(self._makers[name].input) - wanted
            wanted |= new
            names += new
        made = wanted - set(inputs)
        return [node for node in self._model.graph.node if made & set(node.output)]


def _forms(arrays: list[Array], hidden: int) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """(activation, canonical operands) that two matrices, with biases or without, may stand for."""
    first, second, *biases = map(torch.from_numpy, arrays)
    for up, down in product((first, first.mT), (second, second.mT)):
        if up.shape[2] != hidden or down.shape[1] != hidden:
            continue
        inner, rows = down.shape[2], up.shape[1]
        parts = {"up": up, "down": down}
        for name, bias in zip(("up_bias", "down_bias"), biases, strict=False):
            parts[name] = bias
        if rows == inner:
            yield from ((name, {n: t.contiguous() for n, t in parts.items()}) for name in _UNGATED)
        if rows == 2 * inner:
            for halves in (
                (slice(0, inner), slice(inner, None)),
                (slice(0, None, 2), slice(1, None, 2)),
            ):
                split = {name: parts[name] for name in parts if not name.startswith("up")}
                for name in [name for name in parts if name.startswith("up")]:
                    for own, rows_of in zip(("gate", "up"), halves, strict=True):
                        split[name.replace("up", own)] = parts[name][:, rows_of]
                yield from ((name, {n: t.contiguous() for n, t in split.items()}) for name in _GATED)
