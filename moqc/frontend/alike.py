"""Whether two modules compute the same with weights of their own, and which numbers that would depend on.

Two layers are alike when their modules are of the same classes, have weights of the same shapes, equal
buffers and equal attributes. Integers may differ, for a layer knows its number, if tracing did not use them:
`Watch` finds that out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import Tensor

from moqc.frontend.experts import ExpertLayout

Place = tuple[str, str]
"""A module below a layer, and its attribute."""

_ARITHMETIC = (
    "add",
    "sub",
    "mul",
    "mod",
    "floordiv",
    "truediv",
    "pow",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
)
_OPERATORS = (
    *("eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert"),
    *("index", "int", "float", "bool", "hash", "str", "repr", "format", "round"),
    *_ARITHMETIC,
    *(f"r{name}" for name in _ARITHMETIC),
)
_IGNORED = frozenset({"_modules", "forward", "moqc_site"})
_PLAIN = (bool, int, float, complex, str, bytes, set, frozenset, torch.dtype)


class _Watched:
    """Stands for an integer, and tells when it is used."""

    def __init__(self, value: int, note: Callable[[], None]) -> None:
        self.value, self.note = value, note


def _noting(operator: str) -> Callable[..., Any]:
    def method(self: _Watched, *others: Any) -> Any:
        self.note()
        return getattr(self.value, operator)(*others)

    return method


for _name in _OPERATORS:
    setattr(_Watched, f"__{_name}__", _noting(f"__{_name}__"))


class Watch:
    """While it is entered, integer attributes that differ among `layers` tell when they are used."""

    def __init__(self, layers: Sequence[torch.nn.Module]) -> None:
        self._used: dict[torch.nn.Module, set[Place]] = {layer: set() for layer in layers}
        found = [(layer, place, value) for layer in layers for place, value in _integers(layer)]
        values: dict[Place, set[int]] = {}
        for _, place, value in found:
            values.setdefault(place, set()).add(value)
        self._watched = [entry for entry in found if len(values[entry[1]]) > 1]

    def used(self, layer: torch.nn.Module) -> set[Place]:
        """The attributes of `layer` that were used."""
        return self._used[layer]

    def __enter__(self) -> None:
        for layer, (path, name), value in self._watched:
            note = partial(self._used[layer].add, (path, name))
            object.__setattr__(layer.get_submodule(path), name, _Watched(value, note))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for layer, (path, name), value in self._watched:
            object.__setattr__(layer.get_submodule(path), name, value)


def _integers(layer: torch.nn.Module) -> Iterator[tuple[Place, int]]:
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if type(value) is int:
                yield (path, name), value


def kinds(layers: Sequence[torch.nn.Module]) -> dict[torch.nn.Module, tuple[torch.nn.Module, set[Place]]]:
    """Layer -> the first one that is alike, and the integer attributes that differ from that one's."""
    found: dict[torch.nn.Module, tuple[torch.nn.Module, set[Place]]] = {}
    for layer in layers:
        for first in dict.fromkeys(kind for kind, _ in found.values()):
            differing = differing_integers(first, layer)
            if differing is not None:
                found[layer] = first, differing
                break
        else:
            found[layer] = layer, set()
    return found


def differing_integers(one: torch.nn.Module, other: torch.nn.Module) -> set[Place] | None:
    """The integer attributes that differ between two modules; None where something else differs."""
    ones, others = dict(one.named_modules()), dict(other.named_modules())
    if ones.keys() != others.keys():
        return None
    differing = set()
    for path, module in ones.items():
        twin = others[path]
        mine, its = ({n: v for n, v in vars(m).items() if n not in _IGNORED} for m in (module, twin))
        if type(module) is not type(twin) or mine.keys() != its.keys():
            return None
        for name, value in mine.items():
            if not _equal(value, its[name], module, twin):
                if not (type(value) is type(its[name]) is int):
                    return None
                differing.add((path, name))
    return differing


def _equal(value: Any, its: Any, module: torch.nn.Module, twin: torch.nn.Module) -> bool:
    """Whether an attribute of `module` is that of `twin`. What cannot be compared differs."""
    if value is its:
        return True
    if type(value) is not type(its):
        return False
    if isinstance(value, torch.nn.Parameter):
        return (value.shape, value.dtype) == (its.shape, its.dtype)
    if isinstance(value, Tensor):
        return not value.is_meta and torch.equal(value, its)
    if isinstance(value, dict):
        return bool(value.keys() == its.keys()) and all(_equal(value[k], its[k], module, twin) for k in value)
    if isinstance(value, tuple | list):
        pairs = zip(value, its, strict=False)
        return len(value) == len(its) and all(_equal(*pair, module, twin) for pair in pairs)
    if isinstance(value, MethodType):
        own = value.__self__ is module and its.__self__ is twin
        return own and bool(value.__code__ is its.__code__)
    if isinstance(value, ExpertLayout):
        return bool(replace(value, site="") == replace(its, site=""))
    return isinstance(value, _PLAIN) and bool(value == its)
