"""Naming the function between an expert's first and second matrix, by what it computes.

Model code writes the same gate in many ways, so a gate is recognized by its values on random inputs, not by
its source: the first entry of `moqc.quant.activations` that agrees in float64 is its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from moqc.errors import ModelError
from moqc.quant.activations import apply_activation

_GLU = ("silu_glu", "gelu_glu", "gelu_tanh_glu", "relu_glu")
_PLAIN = ("relu2", "silu", "gelu")
_LIMITED = (
    "oai_swiglu(alpha={alpha},limit={limit})",
    "silu_glu_clamp(limit={limit})",
    "silu_glu_postclamp(limit={limit})",
)
_TOLERANCE = 1e-6  # float64; some models compute the gate in float32


def classify_gate(module: Any, site: str) -> str:
    """Name of the gate function of an experts module; ModelError when it is none that moqc knows."""
    limit, alpha = _number(module, "limit"), _number(module, "alpha")
    inputs = _inputs(limit)
    if module.has_gate:
        fused = torch.empty(*inputs.shape[1:-1], 2 * inputs.shape[-1], dtype=inputs.dtype)
        gate_slots, up_slots = _slots(fused, interleaved=not module.is_concatenated)
        gate_slots.copy_(inputs[0])
        up_slots.copy_(inputs[1])
        expected = module._apply_gate(fused)
        gate: torch.Tensor | None = inputs[0]
    else:
        expected = module.act_fn(inputs[1])
        gate = None
    for name in _candidates(bool(module.has_gate), limit, alpha):
        if torch.allclose(apply_activation(name, gate, inputs[1]).to(expected), expected, atol=_TOLERANCE):
            return name
    function = getattr(module, "act_fn", None)
    name = f" ({type(function).__name__})" if isinstance(function, torch.nn.Module) else ""
    raise ModelError(f"{site}: the gate function of {type(module).__name__}{name} is none that moqc knows")


def _inputs(limit: float | None) -> torch.Tensor:
    """Gate and up inputs [2, 64, 8], float64, wide enough that a clamp at `limit` shows."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 64, 8, generator=generator, dtype=torch.float64) * max(6.0, limit or 0.0)


def _slots(fused: torch.Tensor, *, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the gate half and the up half of a fused projection's output."""
    if interleaved:
        return fused[..., ::2], fused[..., 1::2]
    gate, up = fused.chunk(2, dim=-1)
    return gate, up


def _candidates(has_gate: bool, limit: float | None, alpha: float | None) -> Iterator[str]:
    yield from _GLU if has_gate else _PLAIN
    if has_gate and limit is not None:
        for template in _LIMITED:
            yield template.format(alpha=1.0 if alpha is None else alpha, limit=limit)


def _number(module: Any, stem: str) -> float | None:
    """A finite number the module keeps as ``limit`` or ``swiglu_limit`` (``alpha`` alike)."""
    for name in (stem, f"swiglu_{stem}"):
        value = getattr(module, name, None)
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    return None
