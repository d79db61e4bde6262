"""How long calibration and compilation take: work counted from shapes, over rates measured once.

The rates are those of one core of this project's Xeon, from ``moqc compile --time-passes`` on tiny-moe and
small-moe; elsewhere the seconds scale with the speed of matrix products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moqc.frontend.trace import Outline
from moqc.predict.sizes import expert_weights, projections
from moqc.quant.formats import Format

MACHINE = "2-core Xeon with AVX-512, torch on the CPU"
FORWARD_FLOPS = 4.0e10
"""Floating point operations a second of calibration's forward passes."""
QUANTIZER_FLOPS = 1.0e10
"""The same of GPTQ with its descent."""
QUANTIZER_SWEEPS = 8
"""Passes over a matrix by its Hessian: factor, propagation, descent."""
TRELLIS_EFFORT = 3
"""How much longer trellis formats take."""
UNIT_SECONDS = 0.015
"""Of the quantizer for each expert projection and format, whatever its size."""
ROUNDING_RATE = 2.0e7
"""Weights a second that are rounded to nearest with clip search."""
COST_RATE = 4.5e6
"""The same with a grid for every group of few bits, and with the output errors on a sample of tokens."""
BUILD_SECONDS, BUILD_LAYER_SECONDS = 25.0, 1.0
"""Gate, export and code generation: fixed, and for each layer."""
GRADIENT_TOKENS = 8192
"""Calibration tokens of the backward pass, which costs four forward ones: there, again, and twice back."""
FORWARD_PASSES = 3
"""Over all calibration tokens: statistics, inputs of the quantizer, its outputs."""


@dataclass(frozen=True, slots=True)
class Effort:
    """Seconds by what they are spent on, on `machine`."""

    calibration_seconds: float
    quantization_seconds: float
    build_seconds: float
    machine: str = MACHINE


def estimate_effort(model: Outline, formats: Sequence[str], tokens: int) -> Effort:
    """Seconds for the default pipeline with `formats` as candidates and `tokens` of calibration text."""
    active = expert_weights(model, active=True)
    matrices = sum(matrix.rows * matrix.columns for matrix in model.matrices if matrix.linear)
    forward = 2 * (active + matrices)
    gradients = 4 * forward * min(tokens, GRADIENT_TOKENS)
    moments = sum(
        2 * tokens * use.top_k * sum(columns**2 for _, columns in projections(use.layout))
        for use in model.experts
    )
    quantizer = sum(
        2 * QUANTIZER_SWEEPS * use.layout.experts * rows * columns**2
        for use in model.experts
        for rows, columns in projections(use.layout)
    )
    units = sum(use.layout.experts * len(use.layout.projections) for use in model.experts)
    quantizing = quantizer / QUANTIZER_FLOPS + UNIT_SECONDS * units
    efforts = [TRELLIS_EFFORT if Format.parse(name).trellis else 1 for name in formats]
    other = sum(matrix.rows * matrix.columns for matrix in model.matrices)
    costs = sum(efforts) * expert_weights(model) / COST_RATE
    return Effort(
        calibration_seconds=(FORWARD_PASSES * forward * tokens + gradients + moments) / FORWARD_FLOPS + costs,
        quantization_seconds=sum(efforts) / len(efforts) * quantizing + other / ROUNDING_RATE,
        build_seconds=BUILD_SECONDS + BUILD_LAYER_SECONDS * model.layers,
    )
