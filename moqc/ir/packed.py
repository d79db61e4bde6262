"""Names, shapes and dtypes of the operands that hold packed matrices (layout of `moqc.quant.pack`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from tvm import relax

from moqc.ir.calls import PROJECTIONS
from moqc.quant.formats import COLUMN_TILE, ROW_TILE, Format
from moqc.quant.pack import LINE


def packed_types(
    format: Format, rows: int, columns: int, matrices: tuple[int, ...] = ()
) -> dict[str, relax.TensorType]:
    """``codes``, ``scales`` and, unless symmetric, ``zeros`` -> tensor type, stacked by `matrices`."""
    row_tiles, column_tiles = -(-rows // ROW_TILE), -(-columns // COLUMN_TILE)
    groups = [*matrices, row_tiles, format.groups(columns), ROW_TILE]
    types = {
        "codes": relax.TensorType([*matrices, row_tiles, column_tiles, format.bits, LINE], "uint8"),
        "scales": relax.TensorType(groups, "float16"),
    }
    if not format.symmetric:
        types["zeros"] = relax.TensorType(groups, "uint8")
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
