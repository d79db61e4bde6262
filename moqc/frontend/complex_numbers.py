"""Complex tensors in the importer, as pairs of real ones: some models rotate by complex multiplication."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from tvm import relax

if TYPE_CHECKING:
    from moqc.frontend.importer import Importer

Converter = Callable[[torch.fx.Node], Any]

_SHAPE_ONLY = ("unsqueeze.default", "slice.Tensor", "permute.default", "expand.default")


@dataclass(frozen=True, slots=True)
class Complex:
    """A complex tensor: two Relax expressions of one shape."""

    real: relax.Expr
    imaginary: relax.Expr

    def map(self, function: Callable[[relax.Expr], relax.Expr]) -> Complex:
        """`function` of both halves."""
        return Complex(function(self.real), function(self.imaginary))


def complex_converters(importer: Importer, base: dict[str, Converter]) -> dict[str, Converter]:
    """Converters for the operators that make, consume or move complex tensors, by TVM's key.

    `base` are TVM's converters; a real argument goes to them.
    """
    return {
        "polar.default": partial(_polar, importer),
        "view_as_complex.default": partial(_as_complex, importer),
        "view_as_real.default": partial(_as_real, importer),
        "mul.Tensor": partial(_product, importer, base["mul.Tensor"]),
        **{name: partial(_halves, importer, base[name]) for name in _SHAPE_ONLY},
    }


def _polar(importer: Importer, node: torch.fx.Node) -> Complex:
    radius, angle = (importer.env[argument] for argument in node.args)
    return Complex(
        importer.emit(relax.op.multiply(radius, relax.op.cos(angle))),
        importer.emit(relax.op.multiply(radius, relax.op.sin(angle))),
    )


def _as_complex(importer: Importer, node: torch.fx.Node) -> Complex:
    pairs = importer.env[node.args[0]]
    axis = len(pairs.ty.shape) - 1
    halves = importer.emit(relax.op.split(pairs, 2, axis=axis))
    both = Complex(relax.TupleGetItem(halves, 0), relax.TupleGetItem(halves, 1))
    return both.map(lambda half: importer.emit(relax.op.squeeze(half, axis=[axis])))


def _as_real(importer: Importer, node: torch.fx.Node) -> relax.Var:
    value = importer.env[node.args[0]]
    return importer.emit(relax.op.stack([value.real, value.imaginary], axis=len(value.real.ty.shape)))


def _product(importer: Importer, base: Converter, node: torch.fx.Node) -> Any:
    first, second = (importer._retrieve_args(argument) for argument in node.args)
    if not isinstance(first, Complex) and not isinstance(second, Complex):
        return base(node)
    first, second = (first, second) if isinstance(first, Complex) else (second, first)
    return _multiply(importer, first, second)


def _halves(importer: Importer, base: Converter, node: torch.fx.Node) -> Any:
    """A shape-only operator, on both halves of a complex tensor."""
    value = importer.env[node.args[0]]
    if not isinstance(value, Complex):
        return base(node)
    made = value.map(lambda half: _on(importer, node, half, base))
    importer.env[node.args[0]] = value
    return made


def _on(importer: Importer, node: torch.fx.Node, half: relax.Expr, convert: Converter) -> relax.Expr:
    """`convert(node)` with the node's first argument replaced by `half`."""
    importer.env[node.args[0]] = half
    return convert(node)


def _multiply(importer: Importer, value: Complex, factor: Any) -> Complex:
    """A complex tensor times a complex one, a real one or a number."""
    times, plus, minus = relax.op.multiply, relax.op.add, relax.op.subtract
    if not isinstance(factor, Complex):
        scale = factor if isinstance(factor, relax.Expr) else relax.const(factor, value.real.ty.dtype)
        return value.map(lambda half: importer.emit(times(half, scale)))
    real = minus(times(value.real, factor.real), times(value.imaginary, factor.imaginary))
    imaginary = plus(times(value.real, factor.imaginary), times(value.imaginary, factor.real))
    return Complex(importer.emit(real), importer.emit(imaginary))
