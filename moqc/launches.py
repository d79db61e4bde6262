"""A compiled model without a virtual machine: kernels, buffers, and the launches that make one call.

Devices for which TVM's wheel has no runtime (OpenCL, WebGPU) run these: a host fills the buffers of weights
once, and for every call evaluates a list of launches whose grids and scalars are expressions of the number
of sequences and tokens. The same records are read by `moqc.runtime.opencl` and by the page of a web artifact.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moqc.errors import ArtifactError

FILE = "launches.json"
Precision = Literal["float32", "float16"]
Expression = Any
"""An int, a variable's name, or ``[operator, operand, operand]`` with an operator of `OPERATORS`."""

OPERATORS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "min": min,
    "max": max,
    "==": lambda a, b: int(a == b),
    "!=": lambda a, b: int(a != b),
    "<": lambda a, b: int(a < b),
    "<=": lambda a, b: int(a <= b),
    "and": lambda a, b: int(bool(a and b)),
    "or": lambda a, b: int(bool(a or b)),
}
"""Operators on integers that are not negative; division rounds down, comparisons give 0 or 1."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kernel(_Record):
    """One kernel: its text, without the preamble, and the size of its work-groups."""

    source: str
    threads: tuple[int, int, int]
    buffers: int
    """How many buffers it has, which come before its scalars."""
    scalars: int


class Tensor(_Record):
    """A parameter of the artifact as part of a buffer: its stored form is converted to `dtype`."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Buffer(_Record):
    """Device memory of `bytes` bytes.

    `weights` are parameters, one after the other; `constant` is its content in hexadecimal digits; `role`
    says what else it is: the n-th input or cache of main, an output, or scratch.
    """

    bytes: int
    role: Literal["weights", "constant", "input", "cache", "output", "scratch"]
    number: int = 0
    weights: tuple[Tensor, ...] = ()
    constant: str = ""
    dtype: str = "uint8"
    """Of inputs and caches."""
    shape: tuple[Expression, ...] = ()
    """Of inputs and caches."""


class Launch(_Record):
    """One launch of a kernel, if `when` is None or not 0."""

    kernel: str
    buffers: tuple[int, ...]
    scalars: tuple[Expression, ...]
    grid: tuple[Expression, Expression, Expression]
    """Work-groups."""
    when: Expression = None


class Output(_Record):
    """A result: the buffer it is in, and its shape in the variables."""

    buffer: int
    shape: tuple[Expression, ...]


class Program(_Record):
    """One function: its buffers, launches in order, and results. Variables are those of the input shapes."""

    variables: dict[str, int]
    """Name -> largest value."""
    buffers: tuple[Buffer, ...]
    launches: tuple[Launch, ...]
    outputs: tuple[Output, ...]


class Launches(_Record):
    """The content of ``launches.json``: a language of kernels, what precedes each, and main."""

    language: Literal["opencl", "webgpu"]
    types: dict[Precision, str]
    """What every source begins with: "float16" on devices that compute in it, "float32" on all others."""
    preamble: str
    """What comes next."""
    kernels: dict[str, Kernel]
    main: Program


def evaluate(expression: Expression, variables: Mapping[str, int]) -> int:
    """The value of an expression."""
    if isinstance(expression, int):
        return expression
    if isinstance(expression, str):
        return variables[expression]
    operator, first, second = expression
    return OPERATORS[operator](evaluate(first, variables), evaluate(second, variables))


def read_launches(folder: Path) -> Launches:
    """Read ``launches.json`` of an artifact. Raises ArtifactError where it is not valid."""
    try:
        return Launches.model_validate(json.loads((folder / FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"{folder / FILE}: cannot read ({reason}); compile the model again") from error
