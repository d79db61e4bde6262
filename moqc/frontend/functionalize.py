"""In-place operators of a traced graph, replaced by ones that return a new tensor.

Torch does this (and takes composite operators apart) by tracing the whole graph a second time, which takes
several times as long as the export. Model code writes in place in a few plain ways, for which an edit of the
graph suffices; a graph that holds anything else is left to torch.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch.fx import Graph, Node

_PARTS = {
    "slice.Tensor": torch.ops.aten.slice_scatter.default,
    "select.int": torch.ops.aten.select_scatter.default,
}
"""View of a part -> the operator that gives the whole with another part."""


def functionalize(graph: Graph, known: Container[str]) -> bool:
    """Rewrite `graph` in place without in-place operators; False when it must be left to torch.

    `known` are the operators that need no taking apart, as ``name.overload``. After False the graph still
    computes what it did.
    """
    rewriter = _Rewriter(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if not (rewriter.replace(node) if _is_mutable(node) else _name(node) in known):
            return False
    graph.eliminate_dead_code()
    graph.lint()
    return True


class _Rewriter:
    """Replaces in-place operators one by one, in program order."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._order = {node: place for place, node in enumerate(graph.nodes)}

    def replace(self, write: Node) -> bool:
        """Replace `write`, if what it writes is a tensor that nothing else shows, or a part of one."""
        target: Any = write.target
        base = write.args[0]
        written = [entry.name for entry in target._schema.arguments if _is_written(entry)]
        if written != [target._schema.arguments[0].name] or not isinstance(base, Node):
            return False
        if _name(write) == "copy_.default":
            return self._replace_copy(write, base)
        functional = _functional(target)
        if functional is None or not self._is_owned(base, write):
            return False
        with self._graph.inserting_before(write):
            self._finish(write, base, self._graph.call_function(functional, write.args, write.kwargs))
        return True

    def _replace_copy(self, write: Node, part: Node) -> bool:
        """``base[...] = source``, with the result unused: `base` becomes a whole with another part."""
        base, source = (part.args[0] if part.args else None), write.args[1]
        if (
            write.users
            or _name(part) not in _PARTS
            or not (isinstance(base, Node) and isinstance(source, Node))
        ):
            return False
        if str(source.meta["val"].shape) != str(part.meta["val"].shape) or not self._is_owned(base, write):
            return False
        with self._graph.inserting_before(write):
            made = self._graph.call_function(_PARTS[_name(part)], (base, source, *part.args[1:]))
            self._finish(write, base, made)
        return True

    def _finish(self, write: Node, base: Node, result: Node) -> None:
        """Let `result` stand for `base` from `write` on."""
        result.meta = {**write.meta, "val": base.meta["val"]}
        self._order[result] = self._order[write]
        for user in list(base.users):
            if self._order[user] > self._order[write]:
                user.replace_input_with(base, result)
        write.replace_all_uses_with(result)
        self._graph.erase_node(write)

    def _is_owned(self, base: Node, write: Node) -> bool:
        """Whether `base` is memory of its own, and no view of it is read after `write`."""
        if base.op != "call_function" or _is_view(base):
            return False
        # Views made later will be of the new tensor, and so will later writes.
        pending = [user for user in base.users if _is_view(user) and self._order[user] < self._order[write]]
        while pending:
            for user in pending.pop().users:
                if self._order[user] > self._order[write]:
                    return False
                if _is_view(user):
                    pending.append(user)
        return True


def _is_mutable(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _name(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


def _functional(target: Any) -> Any:
    """The operator without the underscore, of the same arguments, or None."""
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
    return getattr(packet, target._overloadname, None)


def _is_view(node: Node) -> bool:
    """Whether the node's result may share memory with an argument."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return any(result.alias_info is not None for result in schema.returns)
    # An item of a tuple is a view when the operator that made the tuple makes views.
    source = node.args[0] if node.op == "call_function" and node.args else None
    return isinstance(source, Node) and _is_view(source)
