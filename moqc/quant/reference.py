"""The oracle: what a linear and an experts block compute, in plain torch float32.

Every kernel is compared with these functions, and calibration and evaluation run on them.
Two modes of activations:

* ``"float"``: exact; weights are used as given (dequantized ones, for a quantized model).
* ``"int8"``: the input of every matrix product is quantized by groups of `ACTIVATION_GROUP` columns:
  ``scale = max|x| / 127``, ``q = round_half_even(x / scale)``. Here the product is taken with ``scale * q``
  in float32; a kernel's integer sums differ from it only by float rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from moqc.quant.activations import apply_activation
from moqc.quant.formats import ACTIVATION_GROUP

Activations = Literal["float", "int8"]


def quantize_activations(x: torch.Tensor, group: int = ACTIVATION_GROUP) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize ``x[..., K]`` symmetrically to int8 by groups of columns; the last group may be short.

    Returns:
        codes int8 ``[..., K]`` in -127..127 and scales float32 ``[..., ceil(K / group)]``; a group of zeros
        has scale 0 and codes 0.

    """
    columns = x.shape[-1]
    grouped = functional.pad(x.float(), (0, -columns % group))
    grouped = grouped.reshape(*x.shape[:-1], -(-columns // group), group)
    scales = grouped.abs().amax(-1) / 127
    steps = scales.unsqueeze(-1)
    codes = torch.where(steps > 0, grouped / steps, 0.0).round().clamp(-127, 127)
    return codes.to(torch.int8).flatten(-2)[..., :columns], scales


def fake_quantize_activations(x: torch.Tensor, group: int = ACTIVATION_GROUP) -> torch.Tensor:
    """``x`` after quantization and dequantization, float32 of the same shape."""
    codes, scales = quantize_activations(x, group)
    return codes * scales.repeat_interleave(group, dim=-1)[..., : x.shape[-1]]


def linear(
    x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, activations: Activations = "float"
) -> torch.Tensor:
    """``x[..., K] @ w[N, K]^T + bias[N]`` in float32, ``[..., N]``."""
    if activations == "int8":
        x = fake_quantize_activations(x)
    return functional.linear(x.float(), w.float(), None if bias is None else bias.float())


def experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    *,
    activation: str,
    gate_bias: torch.Tensor | None = None,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    activations: Activations = "float",
) -> torch.Tensor:
    """One experts block: ``y_t = sum_j weights_tj * (down_e @ act(gate_e @ x_t, up_e @ x_t) + down_bias_e)``.

    Args:
        x: inputs ``[T, H]``.
        ids: chosen experts ``[T, k]``, e = ids[t, j]; an expert may repeat in a row. A pair with an id
            outside ``0 .. E - 1`` is dropped: it adds nothing.
        weights: routing weights ``[T, k]``, applied as given.
        gate: ``[E, I, H]``, None for a block without a gate.
        up: ``[E, I, H]``.
        down: ``[E, H, I]``.
        activation: canonical name, see `moqc.quant.activations`.
        gate_bias: ``[E, I]``.
        up_bias: ``[E, I]``.
        down_bias: ``[E, H]``.
        activations: mode, applied to ``x`` and to the input of ``down``.

    Returns:
        float32 ``[T, H]``.

    """
    inputs = fake_quantize_activations(x) if activations == "int8" else x.float()
    output = torch.zeros(x.shape[0], down.shape[-2], device=x.device)

    for expert, pairs in _pairs_by_expert(ids, up.shape[0]):
        rows = pairs // ids.shape[1]
        tokens = inputs[rows]
        gated = None if gate is None else _expert_linear(tokens, gate, gate_bias, expert)
        hidden = apply_activation(activation, gated, _expert_linear(tokens, up, up_bias, expert))
        if activations == "int8":
            hidden = fake_quantize_activations(hidden)
        share = weights.flatten()[pairs, None].float()
        output.index_add_(0, rows, share * _expert_linear(hidden, down, down_bias, expert))
    return output


def _expert_linear(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, expert: int) -> torch.Tensor:
    return linear(x, w[expert], None if bias is None else bias[expert])


def _pairs_by_expert(ids: torch.Tensor, experts: int) -> list[tuple[int, torch.Tensor]]:
    """Hit experts with the flat indices into ``ids`` that chose them."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    edges = torch.searchsorted(flat[order].long(), torch.arange(experts + 1, device=ids.device)).tolist()
    return [(e, order[edges[e] : edges[e + 1]]) for e in range(experts) if edges[e] < edges[e + 1]]
