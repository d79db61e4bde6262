r"""Options of a pass as text: ``name{bits=2.5 skip="a b" tables=x+y}``, parsed by the type of the field.

A string that holds white space or one of ``{},="+\`` is written in double quotes with JSON's escapes. A
tuple's items are joined by ``+``; the empty tuple is written as nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import typing
from collections.abc import Callable, Iterable
from typing import Any

from moqc.errors import PipelineError
from moqc.passes.base import Pass

QUOTED = r'"(?:[^"\\]|\\.)*"'
VALUE = rf'(?:{QUOTED}|[^\s{{}},="])*'
_BARE = re.compile(r'[^\s{},="+\\]+')


def field_types(cls: type[Pass]) -> dict[str, Any]:
    """Option name -> its type, for the fields of the pass `cls`. PipelineError when one has no text form."""
    hints = typing.get_type_hints(cls)
    types = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    for name, kind in types.items():
        if kind not in _PARSERS:
            raise PipelineError(f"pass {cls.name}: option {name} is of type {kind}; use {_known_types()}")
    return types


def parse_options(cls: type[Pass], given: Iterable[tuple[str, str]]) -> Pass:
    """An instance of `cls` with the options `given` as (name, text). Raises PipelineError."""
    types = field_types(cls)
    values: dict[str, Any] = {}
    for name, text in given:
        if name not in types:
            known = f"known are {', '.join(types)}" if types else "it has none"
            raise PipelineError(f"{cls.name}: unknown option {name!r}{suggest(name, types)}: {known}")
        if name in values:
            raise PipelineError(f"{cls.name}: option {name} is given twice")
        try:
            values[name] = _PARSERS[types[name]](text)
        except ValueError:
            kind = getattr(types[name], "__name__", types[name])
            raise PipelineError(f"{cls.name}: {name}={text} is not of type {kind}") from None
    missing = [
        field.name for field in dataclasses.fields(cls) if _required(field) and field.name not in values
    ]
    if missing:
        raise PipelineError(f"{cls.name} needs a value for {', '.join(missing)}")
    return cls(**values)


def print_pass(item: Pass) -> str:
    """`item` as text: its name and the options that are not the default."""
    options = []
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if _required(field) or value != _default(field):
            options.append(f"{field.name}={_print(value)}")
    return item.name + (f"{{{' '.join(options)}}}" if options else "")


def suggest(word: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the entry of `known` closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _print(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "+".join(_print(item) for item in value)
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    return repr(value)


def _parse_bool(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(text)
    return text == "true"


def _parse_str(text: str) -> str:
    if not text.startswith('"'):
        if not text or '"' in text:
            raise ValueError(text)
        return text
    return str(json.loads(text))


def _parse_tuple(text: str) -> tuple[str, ...]:
    if not text:
        return ()
    if not re.fullmatch(rf'(?:{QUOTED}|[^+"]+)(?:\+(?:{QUOTED}|[^+"]+))*', text):
        raise ValueError(text)
    return tuple(_parse_str(item) for item in re.findall(rf'{QUOTED}|[^+"]+', text))


_PARSERS: dict[Any, Callable[[str], Any]] = {
    int: int,
    float: float,
    bool: _parse_bool,
    str: _parse_str,
    tuple[str, ...]: _parse_tuple,
}


def _known_types() -> str:
    return ", ".join(
        getattr(kind, "__name__", "") if isinstance(kind, type) else str(kind) for kind in _PARSERS
    )
