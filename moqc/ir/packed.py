"""Names, shapes and dtypes of the operands that hold packed matrices (layouts of `moqc.quant.layouts`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tvm import relax

from moqc.ir.calls import PROJECTIONS
from moqc.quant.formats import Format
from moqc.quant.layouts import DEFAULT, find_layout


def packed_types(
    format: Format, rows: int, columns: int, matrices: tuple[int, ...] = (), layout: str = DEFAULT
) -> dict[str, relax.TensorType]:
    """``codes``, ``scales`` and, unless symmetric, ``zeros`` -> tensor type, stacked by `matrices`."""
    codes, groups = find_layout(layout).shapes(format, rows, columns)
    types = {
        "codes": relax.TensorType([*matrices, *codes], "uint8"),
        "scales": relax.TensorType([*matrices, *groups], "uint8" if format.byte_scales else "float16"),
    }
    if not format.symmetric:
        types["zeros"] = relax.TensorType([*matrices, *groups], "uint8")
    return types


def packed_names(format: Format) -> tuple[str, ...]:
    """The parts of a packed matrix: codes, scales and, unless symmetric, zeros."""
    return ("codes", "scales") if format.symmetric else ("codes", "scales", "zeros")


def mixed_operands(classes: Mapping[str, Sequence[Format]], biases: Iterable[str]) -> list[str]:
    """Operand names of a mixed_experts call: ``table``, ``gate.0.codes``, ..., then the biases."""
    names = ["table"]
    for projection in PROJECTIONS:
        for number, format in enumerate(classes.get(projection, ())):
            names += [f"{projection}.{number}.{part}" for part in packed_names(format)]
    return [*names, *biases]
