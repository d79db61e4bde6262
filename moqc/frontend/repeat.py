"""Layers that are alike are traced once: the others are copies of its part of the graph.

Models are stacks of a few kinds of layers, and tracing takes as long for the last one as for the first. While
a model is traced, a layer that is like one before it (`moqc.frontend.alike`) and is called with the same
arguments leaves a single node in the graph; `expand` replaces that by the nodes of the layer it is like, with
its own weights. What is not known to be alike is traced.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moqc.errors import InternalError
from moqc.frontend.alike import Watch, kinds

_MODEL = "model"
"""Name of the transformers model in what is exported."""


@torch.library.custom_op("moqc::layer_begin", mutates_args=())
def _begin(x: Tensor, site: str, number: int) -> Tensor:
    """Mark the input of a traced layer."""
    return x.clone()


@torch.library.custom_op("moqc::layer_end", mutates_args=())
def _end(x: Tensor, site: str, number: int) -> Tensor:
    """Mark the result of the traced layer `number`."""
    return x.clone()


@torch.library.custom_op("moqc::layer_like", mutates_args=())
def _like(x: Tensor, site: str, number: int) -> Tensor:
    """Stand for the layer `site`, which does with x what the traced layer `number` does."""
    return x.clone()


for _operator in (_begin, _end, _like):
    _operator.register_fake(lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format))


class _Traced:
    """A layer that was traced: its call, and its place in the graph."""

    def __init__(self, layer: torch.nn.Module, number: int, arguments: dict[str, Any]) -> None:
        self.layer, self.number, self.arguments = layer, number, arguments
        self.rest: tuple[None, ...] | None = None
        self.whole = False


class _Stack:
    """The layers of a model while it is traced."""

    def __init__(self, site: str, layers: torch.nn.ModuleList) -> None:
        self._sites = {layer: f"{site}.{index}" for index, layer in enumerate(layers)}
        self._forward = {layer: layer.forward for layer in layers}
        self._kinds = kinds(list(layers))
        self._watch = Watch(list(layers))
        self._traced: list[_Traced] = []
        self._count = 0

    def call(self, layer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the layer's forward returns, or a node that stands for it."""
        if layer is next(iter(self._sites)):  # torch traces a model more than once
            self._traced = []
        bound = inspect.signature(self._forward[layer]).bind(*args, **kwargs)
        name, x = next(iter(bound.arguments.items()))
        others = {key: value for key, value in _flat(bound).items() if key != name}
        for known in self._traced:
            if known.whole and self._is_like(layer, others, known):
                y = torch.ops.moqc.layer_like(x, self._sites[layer], known.number)
                return y if known.rest is None else (y, *known.rest)
        bound.arguments[name] = torch.ops.moqc.layer_begin(x, self._sites[layer], self._count)
        traced = _Traced(layer, self._count, others)
        self._count += 1
        result = self._forward[layer](*bound.args, **bound.kwargs)
        self._traced.append(traced)
        return self._ended(traced, x, result)

    def _ended(self, traced: _Traced, x: Tensor, result: Any) -> Any:
        """`result`, marked where it is one tensor like x, alone or with nothing beside it."""
        y, *rest = result if isinstance(result, tuple) else (result,)
        if not isinstance(y, Tensor) or any(item is not None for item in rest):
            return result
        # As text: comparing symbolic sizes would make them equal.
        traced.whole = (str(y.shape), y.dtype) == (str(x.shape), x.dtype)
        traced.rest = tuple(rest) if isinstance(result, tuple) else None
        if not traced.whole:
            return result
        y = torch.ops.moqc.layer_end(y, self._sites[traced.layer], traced.number)
        return y if traced.rest is None else (y, *traced.rest)

    def _is_like(self, layer: torch.nn.Module, others: dict[str, Any], known: _Traced) -> bool:
        if others.keys() != known.arguments.keys():
            return False
        if not all(_same(value, known.arguments[name]) for name, value in others.items()):
            return False
        (kind, differing), (known_kind, known_differing) = self._kinds[layer], self._kinds[known.layer]
        return kind is known_kind and not (differing | known_differing) & self._watch.used(known.layer)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let calls of the layers come here."""
        own = {layer: vars(layer).get("forward") for layer in self._sites}
        try:
            for layer in self._sites:
                object.__setattr__(layer, "forward", partial(self.call, layer))
            with self._watch:
                yield
        finally:
            for layer, forward in own.items():
                object.__delattr__(layer, "forward")
                if forward is not None:
                    object.__setattr__(layer, "forward", forward)


@contextmanager
def repeated(model: torch.nn.Module) -> Iterator[None]:
    """While this lasts, tracing `model` leaves copies for `expand` in the graph."""
    outer = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1
    ]
    if not outer:
        yield
        return
    site, layers = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    with _Stack(site, layers).installed():
        yield


def _flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Arguments by name, further keyword arguments among them."""
    found = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            found |= found.pop(parameter.name, {})
    return found


def _same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same; a container that a layer may write to is never."""
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return one is other
    return isinstance(one, bool | int | float | str | None) and type(one) is type(other) and one == other


def expand(program: torch.export.ExportedProgram) -> bool:
    """Replace the marks that `repeated` left in the graph; False, and nothing done, where that is impossible.

    Raises InternalError for a copy of a layer that has other weights than the traced one.
    """
    graph = program.graph
    begins, ends, likes = (
        [node for node in graph.nodes if node.target is operator._opoverload]
        for operator in (_begin, _end, _like)
    )
    traced = {node.args[2]: _Region(node, program) for node in begins}
    for node in ends:
        traced[node.args[2]].close(node)
    if not all(traced[node.args[2]].is_closed() for node in likes):
        return False
    for node in likes:
        traced[node.args[2]].paste(node)
    for node in (*begins, *ends):
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    graph.lint()
    program.graph_module.recompile()
    return True


class _Region:
    """The nodes of one traced layer, which starts at a mark."""

    def __init__(self, begin: Node, program: torch.export.ExportedProgram) -> None:
        self._begin, self._site = begin, str(begin.args[1])
        self._nodes: list[Node] = []
        self._result: Any = None
        inputs = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        self._inputs = {
            str(spec.target): inputs[spec.arg.name]
            for spec in program.graph_signature.input_specs
            if spec.target is not None
        }

    def close(self, end: Node) -> None:
        """Say where the region ends."""
        self._result = end.args[0]
        node = self._begin.next
        while node is not end:
            self._nodes.append(node)
            node = node.next

    def is_closed(self) -> bool:
        """Whether no tensor of another layer is used here, and none from here elsewhere but the result."""
        inside = {self._begin, *self._nodes}
        before = _before_layers(self._begin.graph)
        taken = {source for node in self._nodes for source in node.all_input_nodes} - inside - before
        given = {node for node in self._nodes if node is not self._result and set(node.users) - inside}
        return not any(isinstance(node.meta.get("val"), Tensor) for node in taken | given)

    def paste(self, place: Node) -> None:
        """Put a copy of the region, with the weights of the layer that `place` stands for, in its stead."""
        site, graph = str(place.args[1]), place.graph
        made: dict[Any, Any] = {self._begin: place.args[0], **self._weights(site)}
        with graph.inserting_before(place):
            for node in self._nodes:
                made[node] = graph.node_copy(node, lambda source: made.get(source, source))
                made[node].args = tuple(self._renamed(argument, site) for argument in made[node].args)
        place.replace_all_uses_with(made[self._result])
        graph.erase_node(place)

    def _weights(self, site: str) -> dict[Node, Node]:
        """Weight of the traced layer -> that of the layer called `site`."""
        own, theirs = (f"{_MODEL}.{name}." for name in (self._site, site))
        found = {}
        for name, node in self._inputs.items():
            if name.startswith(own):
                if theirs + name.removeprefix(own) not in self._inputs:
                    raise InternalError(f"{site}: has no weight like {name} of the layer it is to copy")
                found[node] = self._inputs[theirs + name.removeprefix(own)]
        return found

    def _renamed(self, argument: Any, site: str) -> Any:
        """Where `argument` names a part of the traced layer: that part of the layer called `site`."""
        if isinstance(argument, str) and f"{argument}.".startswith(f"{self._site}."):
            return site + argument.removeprefix(self._site)
        return argument


def _before_layers(graph: Graph) -> set[Node]:
    """Inputs and all else that is computed before the first layer."""
    first = next(node for node in graph.nodes if node.target is _begin._opoverload)
    return set(takewhile(lambda node: node is not first, graph.nodes))
