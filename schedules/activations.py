"""TIR expressions of the activations of `moqc.quant.activations`, for scalars and for vectors alike.

LLVM has no vector ``exp``, ``tanh`` and ``erf`` without a vector math library (it would call libm once
a lane), so they are written out here. Relative errors against float64, measured over the whole useful range:
`exp` 9e-8, `tanh` 3e-7, `erf` 4e-7. All expressions are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm import tirx

from moqc.errors import InternalError
from moqc.quant.activations import parse_activation

_LOG2_E = 1.44269504088896341
# ln 2 in two parts, the first with few bits, so that x - n * ln 2 keeps its low bits (Cody and Waite).
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
# exp(r) on |r| <= ln(2)/2, highest power first (Cephes expf).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
# Rational approximations x * p(x^2) / q(x^2) (Eigen's ptanh_float and perf_float), highest power first.
_TANH_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def _polynomial(x: tirx.Expr, coefficients: Sequence[float]) -> tirx.Expr:
    """Horner's rule; `coefficients` run from the highest power down."""
    value = x * coefficients[0] + coefficients[1]
    for coefficient in coefficients[2:]:
        value = value * x + coefficient
    return value


def _like(x: tirx.Expr, element: str) -> str:
    """The data type of `element`s with as many lanes as `x`."""
    lanes = x.ty.dtype.lanes
    return element if lanes == 1 else f"{element}x{lanes}"


def _constant(value: float, x: tirx.Expr) -> tirx.Expr:
    return tirx.const(value, _like(x, "float32"))


def _clamp(x: tirx.Expr, low: float, high: float) -> tirx.Expr:
    return tirx.max(tirx.min(x, _constant(high, x)), _constant(low, x))


def exp(x: tirx.Expr) -> tirx.Expr:
    """e**x for float32 `x`, scalar or vector; never below 1.6e-38 (x = -87), so never denormal."""
    x = _clamp(x, -87.0, 88.0)
    whole = tirx.floor(x * _LOG2_E + 0.5)
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    mantissa = _polynomial(rest, _EXP) * rest * rest + rest + 1.0
    exponent = (tirx.Cast(_like(x, "int32"), whole) + 127) << 23
    return mantissa * tirx.reinterpret(_like(x, "float32"), exponent)


def sigmoid(x: tirx.Expr) -> tirx.Expr:
    """1 / (1 + e**-x)."""
    return 1.0 / (1.0 + exp(-x))


def tanh(x: tirx.Expr) -> tirx.Expr:
    """Hyperbolic tangent; saturates beyond ±9."""
    x = _clamp(x, -9.0, 9.0)
    square = x * x
    return x * _polynomial(square, _TANH_P) / _polynomial(square, _TANH_Q)


def erf(x: tirx.Expr) -> tirx.Expr:
    """Error function; saturates beyond ±4."""
    x = _clamp(x, -4.0, 4.0)
    square = x * x
    return x * _polynomial(square, _ERF_P) / _polynomial(square, _ERF_Q)


def _silu(x: tirx.Expr) -> tirx.Expr:
    return x * sigmoid(x)


def _gelu(x: tirx.Expr) -> tirx.Expr:
    return x * 0.5 * (1.0 + erf(x * 0.7071067811865476))


def _gelu_tanh(x: tirx.Expr) -> tirx.Expr:
    return x * 0.5 * (1.0 + tanh((x + x * x * x * 0.044715) * 0.7978845608028654))


def _relu(x: tirx.Expr) -> tirx.Expr:
    return tirx.max(x, _constant(0.0, x))


_GATED = {"silu_glu": _silu, "gelu_glu": _gelu, "gelu_tanh_glu": _gelu_tanh, "relu_glu": _relu}


def activation_expr(name: str, gate: tirx.Expr | None, up: tirx.Expr) -> tirx.Expr:
    """The hidden value of an expert from its projections.

    `name` is canonical (``silu_glu``, ``oai_swiglu(alpha=1.702,limit=7.0)``, ...). `gate` (None for an
    activation without one) and `up` are float32 of equal lanes. Both appear several times in the result, so
    pass variables or loads, not long sums.
    """
    activation = parse_activation(name)
    if activation.rotated:
        raise InternalError(f"activation {name}: an expression of one element has no rotation")
    kind, alpha, limit = activation.kind, activation.alpha, activation.limit
    if kind == "relu2":
        return _relu(up) * _relu(up)
    if kind == "silu":
        return _silu(up)
    if kind == "gelu":
        return _gelu(up)
    if gate is None:
        raise InternalError(f"activation {name} needs a gate projection")
    if kind in _GATED:
        return _GATED[kind](gate) * up
    capped, clamped = tirx.min(gate, _constant(limit, gate)), _clamp(up, -limit, limit)
    if kind == "oai_swiglu":
        return capped * sigmoid(capped * alpha) * (clamped + 1.0)
    if kind == "silu_glu_clamp":
        return _silu(capped) * clamped
    if kind == "silu_glu_postclamp":
        return tirx.min(_silu(gate), _constant(limit, gate)) * clamped
    raise InternalError(f"no TIR expression for activation {name}")
