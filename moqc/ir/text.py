"""IR modules as text (TVMScript) and back: dumps, reproducers, golden tests and `moqc opt` use these two."""

from __future__ import annotations

import re

import tvm
from tvm import IRModule

import moqc.ir.ops  # noqa: F401  R.moqc.* must be known to the parser
from moqc.errors import UserError
from moqc.ir.annotations import SCHEMA, SCHEMA_VERSION

# TVM prints constants without a finite value as strings, which its parser does not take for numbers.
_NOT_FINITE = re.compile(r'R\.const\("(-?inf|nan)"')


def print_module(mod: IRModule) -> str:
    """`mod` as TVMScript text that `parse_module` reads back structurally equal.

    Constants are appended as a metadata section, which is left out when there are none.
    """
    text: str = mod.script(show_meta=True)
    return text if text.endswith("\n") else text + "\n"


def parse_module(text: str, where: str = "the text") -> IRModule:
    """The module that `text` (of `print_module`) describes; `where` names it in errors.

    TVM's parser evaluates the text's expressions as Python: read it from people you trust. Raises UserError
    when it does not parse, or its annotations have another schema version.
    """
    try:
        mod = tvm.script.from_source(_NOT_FINITE.sub(r'R.const(float("\1")', text))
    except (
        tvm.error.DiagnosticError,
        SyntaxError,
        ValueError,
        TypeError,
        NameError,
        AttributeError,
    ) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{where} is not an IR module: {reason}") from error
    if not isinstance(mod, IRModule):
        raise UserError(f"{where} holds a single function, not an IR module")
    schema = SCHEMA.get(mod)
    if schema not in (None, SCHEMA_VERSION):
        raise UserError(f"{where} has annotations of schema {schema}; this moqc reads {SCHEMA_VERSION}")
    return mod
