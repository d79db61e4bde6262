"""The importer's slices and concatenations: what is whole is left whole, what is empty is left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import tvm
from tvm import relax
from tvm.sym import Analyzer

from moqc.frontend.complex_numbers import Complex

if TYPE_CHECKING:
    from moqc.frontend.importer import Importer

_NO_END = 2**63 - 1  # torch's end of a slice without one

Node = torch.fx.Node
Piece = tuple[relax.Expr, int, int]
"""A part of a concatenation, and its first and last + 1 position along the axis."""
Pieces = tuple[int, list[Piece]]
"""The axis of a concatenation, and its parts."""


def slice_converters(
    importer: Importer, base: dict[str, Callable[[Node], Any]]
) -> dict[str, Callable[[Node], Any]]:
    """Converters for `importer` that fall back to those of `base`."""
    slices = _Slices(importer)
    return {
        "slice_scatter.default": slices.assembler(base["slice_scatter.default"]),
        "slice.Tensor": slices.slicer(base["slice.Tensor"]),
        "cat.default": slices.joiner(base["cat.default"]),
    }


class _Slices:
    """The converters, and what each concatenation was made of."""

    def __init__(self, importer: Importer) -> None:
        self._importer = importer
        self._pieces: dict[relax.Var, Pieces] = {}

    def assembler(self, base: Callable[[Node], Any]) -> Callable[[Node], Any]:
        """Converter of ``x[..., start:end] = source``: a concatenation where sizes are known, else `base`.

        Models that fill an empty tensor part by part then become one concatenation of the parts.
        """

        def convert(node: Node) -> Any:
            x, source, axis, start, end, step = self._importer.given(node, 0, None, None, 1)
            axis %= len(x.ty.shape)
            size = x.ty.shape[axis]
            if step != 1 or not isinstance(size, tvm.tirx.IntImm):
                return base(node)
            begin, stop, _ = slice(start, end).indices(int(size))
            if begin >= stop:
                return x
            before, after = [], []
            for piece, low, high in self._pieces_of(x, axis):
                before += self._part(piece, axis, low, low, min(high, begin))
                after += self._part(piece, axis, low, max(low, stop), high)
            pieces = [*before, (source, begin, stop), *after]
            made = self._importer.emit(relax.op.concat([piece for piece, _, _ in pieces], axis=axis))
            self._pieces[made] = (axis, pieces)
            return made

        return convert

    def joiner(self, base: Callable[[Node], Any]) -> Callable[[Node], Any]:
        """Converter of a concatenation, without parts of no extent: TVM cannot schedule those."""

        def convert(node: Node) -> Any:
            parts, axis = self._importer.given(node, 0)
            if any(isinstance(part, Complex) or part.ty.shape is None for part in parts):
                return base(node)
            kept = [part for part in parts if not _equal(part.ty.shape[axis % len(part.ty.shape)], 0)]
            return kept[0] if len(kept) == 1 else self._importer.emit(relax.op.concat(kept, axis=axis))

        return convert

    def slicer(self, base: Callable[[Node], Any]) -> Callable[[Node], Any]:
        """Converter of ``x[..., start:end:step]`` that sees when a slice is the whole, else `base`.

        TVM's lets a symbolic extent grow to an expression that later reshapes cannot divide.
        """

        def convert(node: Node) -> Any:
            x, axis, start, end, step = self._importer.given(node, 0, None, None, 1)
            if isinstance(x, Complex) or x.ty.shape is None or step != 1:
                return base(node)
            size = x.ty.shape[axis % len(x.ty.shape)]
            from_start = start is None or _equal(start, 0) or _equal(start + size, 0)
            to_end = end is None or _equal(end, size) or (isinstance(end, int) and end == _NO_END)
            return x if from_start and to_end else base(node)

        return convert

    def _pieces_of(self, x: relax.Var, axis: int) -> list[Piece]:
        """What `x` was concatenated from along `axis`, or `x` whole."""
        known_axis, pieces = self._pieces.get(x, (axis, []))
        return pieces if pieces and known_axis == axis else [(x, 0, int(x.ty.shape[axis]))]

    def _part(self, piece: relax.Expr, axis: int, low: int, begin: int, end: int) -> list[Piece]:
        """The part [begin, end) of a piece that starts at `low`; nothing when it is empty."""
        if begin >= end:
            return []
        if end - begin < int(piece.ty.shape[axis]):
            piece = self._importer.emit(relax.op.strided_slice(piece, [axis], [begin - low], [end - low]))
        return [(piece, begin, end)]


def _equal(first: Any, second: Any) -> bool:
    """Whether two sizes, integers or TIR expressions, are the same for all values of their symbols."""
    return bool(Analyzer().can_prove_equal(first, second))
