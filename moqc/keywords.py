"""Options as one list: the fields of a frozen dataclass.

The same fields are keyword arguments of a function (`keywords`), keys of a file (`build`) and options of a
command (`moqc.commands.options.options`). A field says its default and what it means once, by `option`.
Nothing heavy is imported here: `moqc --help` reads the lists.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from moqc.errors import UserError

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")


@dataclass(frozen=True)
class Spelling:
    """How an option is written and read; see `option`."""

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    parse: Callable[[str], Any] | None = None
    joined: bool = False
    complete: Callable[[], list[str]] | None = None


def option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    flags: tuple[str, ...] = (),
    parse: Callable[[str], Any] | None = None,
    joined: bool = False,
    complete: Callable[[], list[str]] | None = None,
) -> Any:
    """A field of a list of options.

    Args:
        default: its value when nothing is given.
        help: what it means, without a period at the end.
        metavar: stands for the value in a command's help.
        flags: on the command line; by default ``--name``.
        parse: reads the value, or each item of a tuple, where it is a string; raises UserError.
        joined: a tuple of strings is written with commas, and not by repeating the option.
        complete: the values that a shell may complete.

    """
    return dataclasses.field(
        default=default, metadata={"option": Spelling(help, metavar, flags, parse, joined, complete)}
    )


def like(cls: type[Any], name: str) -> Any:
    """A field with the default and the spelling of the option `name` of another list."""
    field = cls.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def spellings(cls: type[Any]) -> dict[str, Spelling]:
    """The options of `cls`; fields that are no options are left out."""
    return {
        field.name: field.metadata["option"]
        for field in dataclasses.fields(cls)
        if "option" in field.metadata
    }


def flags(name: str, spelling: Spelling) -> tuple[str, ...]:
    """How the option `name` is written on a command line."""
    return spelling.flags or (f"--{name.replace('_', '-')}",)


def build(cls: type[T], values: Mapping[str, Any], origin: str) -> T:
    """An instance of the list `cls` from plain values.

    Raises UserError that starts with `origin`, for a key that is none of its fields or a value of another
    type.
    """
    from pydantic import TypeAdapter, ValidationError

    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise UserError(f"{origin}: unknown option {key!r}: known are {', '.join(known)}")
    try:
        return TypeAdapter(cls).validate_python(_parsed(cls, values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        message = f"{first['msg'][:1].lower()}{first['msg'][1:]}"
        raise UserError(f"{origin}: {place}: {message}, got {first['input']!r}") from error


def _parsed(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with the strings among them read where an option says how, lists as tuples, paths as texts."""
    found = dict(values)
    for name, spelling in spellings(cls).items():
        if name in found:
            found[name] = _read(found[name], spelling, many=isinstance(getattr(cls, name), tuple))
    return found


def _read(value: Any, spelling: Spelling, *, many: bool) -> Any:
    def one(item: Any) -> Any:
        item = str(item) if isinstance(item, PurePath) else item
        return spelling.parse(item) if spelling.parse and isinstance(item, str) else item

    if not many or (spelling.joined and isinstance(value, str)):
        return one(value)
    if value is None:
        return ()
    if not isinstance(value, list | tuple):
        return value
    return tuple(value) if spelling.joined else tuple(one(item) for item in value)


class _Decorator(Protocol[P, T_co]):
    """Takes a list of options off the end of a function's parameters, and puts its fields there."""

    @typing.overload
    def __call__(self, function: Callable[[A, T_co], R]) -> Callable[Concatenate[A, P], R]: ...
    @typing.overload
    def __call__(self, function: Callable[[A, B, T_co], R]) -> Callable[Concatenate[A, B, P], R]: ...


def keywords(cls: Callable[P, T]) -> _Decorator[P, T]:
    """Decorator: the last parameter of a function, a list of options, becomes keyword arguments.

    They are listed under Args in its docstring, and validated as `build` does.
    """
    kind = cast(type[Any], cls)
    fields = dataclasses.fields(kind)
    names = {field.name for field in fields}
    hints = typing.get_type_hints(cls)

    def decorate(function: Callable[..., R]) -> Callable[..., R]:
        *positional, last = inspect.signature(function).parameters.values()

        @functools.wraps(function)
        def call(*args: Any, **given: Any) -> R:
            values = {name: value for name, value in given.items() if name in names}
            others = {name: value for name, value in given.items() if name not in names}
            inspect.signature(function).bind(
                *args, **others, **{last.name: None}
            )  # TypeError as from any call
            return function(*args, **others, **{last.name: build(kind, values, function.__name__)})

        parameters = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in fields
        ]
        call.__signature__ = inspect.Signature([*positional, *parameters])  # type: ignore[attr-defined]
        call.__doc__ = _documented(function.__doc__ or "", kind)
        return call

    return cast(_Decorator[P, T], decorate)


def _documented(doc: str, cls: type[Any]) -> str:
    """`doc` with the options of `cls` after the last line of its Args."""
    lines = [f"{name}: {spelling.help}." for name, spelling in spellings(cls).items()]
    wrapped = [
        text
        for line in lines
        for text in textwrap.wrap(line, 100, initial_indent=" " * 8, subsequent_indent=" " * 12)
    ]
    head, mark, rest = inspect.cleandoc(doc).partition("\nArgs:\n")
    if not mark:
        return "\n".join([head, "", "Args:", *(line[4:] for line in wrapped), ""])
    arguments, _, after = rest.partition("\n\n")
    return "\n".join([f"{head}{mark}{arguments}", *(line[4:] for line in wrapped), "", after])
