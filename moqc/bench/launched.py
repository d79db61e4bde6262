"""Static counts of a packed kernel: what decoding costs a thread, read off the generated OpenCL source."""

from __future__ import annotations

import re

import tvm

from moqc.device_code import compile_function
from moqc.errors import InternalError
from moqc.quant.formats import COLUMN_TILE, Format
from moqc.schedules.portable.emit import REAL_NAME
from moqc.schedules.portable.linear import LinearShape, linear_function
from moqc.targets import find_target

ROWS, COLUMNS = 2048, 2048
_LOCAL = re.compile(r"__local (?:float|int) \w+\[(\d+)\]")
_CAST = rf"\({REAL_NAME}\)\("
_OPERATORS = {"bit_operations": r">>|<<|&|\|", "conversions": _CAST}


def count_format(format: Format) -> dict[str, float]:
    """Counts of the one-token product of a matrix in `format`.

    For each weight: `loads` of packed words and of activations, `bit_operations`, `conversions` and
    `multiply_adds` (one for the zero point, one for the product); for each work-group: `shared_bytes`. Not
    counted: what is done once for 32 weights, and the conversion of an activation, which is none in float32.
    """
    target = tvm.target.Target(find_target("opencl").tvm)
    code = compile_function("product", linear_function(LinearShape(format, ROWS, COLUMNS)), target)
    source = code.kernels["product_kernel"].source
    body = _loop(source)
    decoded = [line for line in body if re.match(r"\s*_ptr_1\[\d+\] = ", line)]
    if len(decoded) != COLUMN_TILE:
        raise InternalError(f"{format}: {len(decoded)} weights decoded in a turn, not {COLUMN_TILE}")
    text = "\n".join(decoded)
    found = {name: len(re.findall(pattern, text)) for name, pattern in _OPERATORS.items()}
    found["loads"] = sum(line.count("words_ptr[") + line.count("x_ptr[") for line in body)
    sums = next(line for line in body if " * _ptr_1[" in line)
    found["multiply_adds"] = len(decoded) + sums.count(" * _ptr_1[")
    counts = {name: round(count / COLUMN_TILE, 4) for name, count in sorted(found.items())}
    return counts | {"shared_bytes": 4.0 * sum(int(size) for size in _LOCAL.findall(source))}


def _loop(source: str) -> list[str]:
    """The lines of the loop over columns, the first of the kernel."""
    lines = source.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  for "))
    last = next(number for number, line in enumerate(lines) if number > first and line.startswith("  }"))
    return lines[first:last]
