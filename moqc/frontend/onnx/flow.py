"""An ONNX graph as a flow of tensors: who makes what, what only depends on stored weights, where it narrows.

The graphs inside of If nodes are laid out between the others, under names of their own, so that whoever
follows tensors sees one list of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, shape_inference
from onnx.reference import ReferenceEvaluator

from moqc.errors import ModelError
from moqc.frontend.onnx.reader import MICROSOFT, MOQC, OnnxModel

Array = NDArray[Any]
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
MISFITS = (RuntimeError, ValueError, TypeError, IndexError, KeyError)
"""What `Flow.run` raises where shapes do not fit."""
_MEASURES = ("Shape", "Size")


@dataclass(frozen=True, eq=False)
class Step:
    """A node, or one inside of an If. `outer` is the node of the graph that it is, or is in."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    node: onnx.NodeProto
    outer: onnx.NodeProto

    @property
    def inside(self) -> bool:
        """Whether it is in a branch of an If."""
        return self.node is not self.outer


class Flow:
    """`steps` in order; `constant` names depend on weights alone, `neutral` ones on weights and shapes."""

    def __init__(self, model: OnnxModel) -> None:
        self.model = model
        self.steps = [step for node in model.graph.node for step in _lay_out(node)]
        self.makers = {name: step for step in self.steps for name in step.outputs}
        self.users: dict[str, list[Step]] = {}
        for step in self.steps:
            for name in dict.fromkeys(step.inputs):
                self.users.setdefault(name, []).append(step)
        self.constant = self._depend_on_nothing_else(())
        self.neutral = self._depend_on_nothing_else(_MEASURES)
        self._results = {entry.name for entry in model.graph.output}
        self._types = _infer_types(model)

    def _depend_on_nothing_else(self, free: tuple[str, ...]) -> set[str]:
        found = set(self.model.weights)
        for step in self.steps:
            if step.kind in free or found.issuperset(step.inputs):
                found.update(step.outputs)
        return found

    def rank(self, name: str) -> int:
        """Number of dimensions; -1 where it is not known."""
        dims = self._dims(name)
        return -1 if dims is None else len(dims)

    def columns(self, name: str) -> int | None:
        """The last size; None where it is not known."""
        dims = self._dims(name)
        return dims[-1] if dims else None

    def is_float(self, name: str, kinds: tuple[int, ...] = FLOATS) -> bool:
        """Whether the tensor is known to hold floats, of the `kinds` given."""
        return name in self._types and self._types[name].elem_type in kinds

    def tokens(self, name: str, least: int) -> int:
        """A number of rows that `name` can have: `least`, or the next that fits sizes stored in the graph."""
        dims = (self._dims(name) or [])[:-1]
        if dims and None not in dims:
            return math.prod(dim or 1 for dim in dims)
        stored = [entry.type.tensor_type.shape.dim for entry in self.model.graph.input]
        step = math.lcm(*(dim.dim_value or 1 for shape in stored for dim in shape[:-1]))
        return -(-least // step) * step

    def shape(self, name: str, tokens: int, more: int = 1) -> tuple[int, ...]:
        """Sizes of `name` but the last `more`, for so many tokens: unknown ones are 1, but for the last."""
        dims = self._dims(name) or []
        leading = dims[: len(dims) - more]
        left, sizes = tokens // math.prod(dim or 1 for dim in leading), list[int]()
        for dim in reversed(leading):
            sizes.append(dim or left)
            left = left if dim else 1
        return tuple(sizes[::-1])

    def _dims(self, name: str) -> list[int | None] | None:
        if name in self.model.weights:
            return list(self.model.weights[name].dims)
        if name in self.constant and name not in self._types:  # in a branch
            return list(self.value(name).shape)
        if name not in self._types or not self._types[name].HasField("shape"):
            return None
        return [dim.dim_value or None for dim in self._types[name].shape.dim]

    def joins(self, start: Step) -> Iterator[Step]:
        """The nodes through which all goes that depends on `start`, in order."""
        left: dict[str, int] = {}  # how often what depends on it is still read
        spread: set[str] = set()
        for step in self.steps:
            used = spread.intersection(step.inputs)
            if not used and step is not start:
                continue
            for name in used:
                left[name] -= 1
                if not left[name]:
                    del left[name]
            spread.update(step.outputs)
            left |= {name: count for name in step.outputs if (count := self._uses(name))}
            if not step.inside and step is not start and list(left) == [step.outputs[0]]:
                yield step

    def _uses(self, name: str) -> int:
        return len(self.users.get(name, ())) + (name in self._results)

    def cuts(self, results: Iterable[str], given: Iterable[str]) -> Iterator[tuple[str, list[Step]]]:
        """Single tensors that, with those `given`, determine the `results`, each with the steps behind it.

        The nearest to the results come first. Sizes and weights do not count.
        """
        free = self.neutral.union(given)
        live, behind = set(results) - free, list[Step]()
        for step in reversed(self.steps):
            if live.isdisjoint(step.outputs):
                continue
            live.difference_update(step.outputs)
            live.update(name for name in step.inputs if name not in free)
            behind.append(step)
            if len(live) == 1:
                yield next(iter(live)), behind[::-1]

    def above(self, name: str) -> set[str]:
        """Names that `name` depends on, itself among them; without sizes and weights."""
        found, names = {name}, [name]
        while names:
            step = self.makers.get(names.pop())
            new = set(step.inputs if step else ()) - self.neutral - found
            found |= new
            names += new
        return found

    def value(self, name: str) -> Array:
        """A constant."""
        if name in self.model.weights:
            return np.asarray(self.model.array(name))
        step = self.makers[name]
        node = onnx.NodeProto()
        node.CopyFrom(step.node)
        names = dict(zip(filter(None, step.node.input), step.inputs, strict=True))
        del node.input[:]
        node.input.extend(names.get(own, "") for own in step.node.input)
        result = step.node.output[step.outputs.index(name)]
        return self._compute([node], {own: self.value(own) for own in step.inputs}, [result])[0]

    def run(self, given: dict[str, Array], results: list[str]) -> list[Array]:
        """`results` for the values `given`, by onnx's reference. What only its shape is asked of is made up.

        Raises `MISFITS` where shapes do not fit.
        """
        wanted, measured = self._wanted(results, given)
        tokens = max(math.prod(value.shape[:-1]) for value in given.values())
        values = given | {name: self._made_up(name, tokens) for name in measured}
        steps = [step for step in self.steps if wanted & set(step.outputs)]
        names = {name for step in steps for name in step.inputs} & self.model.weights.keys()
        outer = {id(step.outer) for step in steps}
        nodes = [node for node in self.model.graph.node if id(node) in outer]
        return self._compute(nodes, values | {name: self.value(name) for name in names}, results)

    def _compute(
        self, nodes: list[onnx.NodeProto], values: dict[str, Array], results: list[str]
    ) -> list[Array]:
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in values.items()
        ]
        outputs = [helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None) for name in results]
        graph = helper.make_graph(nodes, "part", inputs, outputs)
        whole = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.model.opset)])
        with np.errstate(all="ignore"):  # other widths than the model's are tried
            found: Any = ReferenceEvaluator(whole).run(None, values)
        return [np.asarray(array) for array in found]

    def _wanted(self, results: list[str], given: Iterable[str]) -> tuple[set[str], set[str]]:
        """Names that have to be computed, and those whose shape is asked of and that need more than is given.

        Raises KeyError where the results need more.
        """
        known = {*given, *self.model.weights}
        wanted, outside = set[str](), set[str]()
        for result in results:
            wanted |= self._needed(result, known)
        left = self._measured(wanted)
        while left:
            name = left.pop()
            try:
                new = self._needed(name, known | wanted)
            except KeyError:
                outside.add(name)
                continue
            wanted |= new
            left |= self._measured(new) - wanted - outside
        return wanted, outside - known - wanted

    def _needed(self, result: str, known: set[str]) -> set[str]:
        """Names that `result` is computed from, without known ones and what only Shape reads."""
        wanted: set[str] = set()
        names = [result]
        while names:
            name = names.pop()
            if name not in known and name not in wanted:
                step = self.makers[name]  # a KeyError: an input of the graph
                wanted.update(step.outputs)
                names += [] if step.kind in _MEASURES else step.inputs
        return wanted

    def _measured(self, names: set[str]) -> set[str]:
        steps = [self.makers[name] for name in names]
        return {name for step in steps if step.kind in _MEASURES for name in step.inputs}

    def _made_up(self, name: str, tokens: int) -> Array:
        """Zeros of the shape that `name` has for so many tokens."""
        dims, leading = self._dims(name) or [], self.shape(name, tokens, int(self.is_float(name)))
        dtype = helper.tensor_dtype_to_np_dtype(self._types[name].elem_type)
        return np.zeros((*leading, *(dim or 1 for dim in dims[len(leading) :])), dtype)


def _lay_out(node: onnx.NodeProto) -> Iterator[Step]:
    """The node, behind the nodes of its branches."""
    results: list[str] = []
    reads: list[str] = []
    for attribute in node.attribute if node.op_type == "If" else ():
        own = {name: f"{node.output[0]}/{attribute.name}/{name}" for name in _made(attribute.g)}
        for inner in attribute.g.node:
            for step in _lay_out(inner):
                inputs, outputs = (
                    tuple(own.get(name, name) for name in names) for names in (step.inputs, step.outputs)
                )
                yield Step(step.kind, inputs, outputs, step.node, node)
        results += [own.get(entry.name, entry.name) for entry in attribute.g.output]
    if node.op_type != "If":
        reads = [name for entry in node.attribute for name in _read(entry)]
    inputs = (*node.input, *results, *reads)
    yield Step(node.op_type, tuple(filter(None, inputs)), tuple(filter(None, node.output)), node, node)


def _made(graph: onnx.GraphProto) -> list[str]:
    return [name for node in graph.node for name in node.output] + [t.name for t in graph.initializer]


def _read(attribute: onnx.AttributeProto) -> Iterator[str]:
    """Names that the graphs of other nodes (Loop, Scan) read, from outside too."""
    for graph in (attribute.g, *attribute.graphs):
        own = {*_made(graph), *(entry.name for entry in graph.input)}
        for node in graph.node:
            names = [*node.input, *(name for inner in node.attribute for name in _read(inner))]
            yield from (name for name in names if name and name not in own)


def _infer_types(model: OnnxModel) -> dict[str, onnx.TypeProto.Tensor]:
    """What onnx infers; of operators of other domains nothing. Raises ModelError for types that clash."""
    opsets = [("", model.opset), (MICROSOFT, 1), (MOQC, 1)]
    whole = helper.make_model(model.graph, opset_imports=[helper.make_opsetid(*pair) for pair in opsets])
    try:
        graph = shape_inference.infer_shapes(whole, data_prop=True).graph
    except shape_inference.InferenceError as error:
        text = " ".join(str(error).split())
        raise ModelError(f"{model.path}: onnx cannot infer its types: {text}") from error
    values = (*graph.value_info, *graph.input, *graph.output)
    return {value.name: value.type.tensor_type for value in values}
