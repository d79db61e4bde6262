"""Experts modules outside of transformers' experts interface, told by their parameters and their forward.

What is looked for are stacked matrices, ``gate_up_proj`` and ``down_proj`` of three dimensions or the ``w1``,
``v1`` and ``w2`` of a child with all experts' rows below each other, and a forward that takes the routing.
Such a module is marked like one that transformers decorates; whether that was right the gate finds out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, H], ids [T, k], weights [T, k] -> [T, H]: the experts of one block."""

FLAT = {"gate": "mlp.w1", "up": "mlp.v1", "down": "mlp.w2"}
"""Parameters of a block whose experts lie below each other, [E * I, H] each, down transposed."""


def mark(module: Any) -> None:
    """Give a plain experts module the marks of a decorated one; leave any other alone."""
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if hasattr(module, "has_gate") or arguments != ["hidden_states", "top_k_index", "top_k_weights"]:
        return
    stacked = _stacked(module)
    flat = not stacked and all(_parameter(module, name) is not None for name in FLAT.values())
    activation = getattr(module.mlp if flat else module, "activation_fn" if flat else "act_fn", None)
    if not (stacked or flat) or activation is None:
        return
    module.has_gate, module.has_bias, module.is_concatenated = True, False, True
    module.is_transposed = False
    module.moqc_flat, module.moqc_plain = flat, True
    object.__setattr__(module, "_apply_gate", lambda fused: _gated(fused, activation))


def _stacked(module: Any) -> bool:
    fused, down = (_parameter(module, name) for name in ("gate_up_proj", "down_proj"))
    if fused is None or down is None or fused.dim() != 3 or down.dim() != 3:
        return False
    # More rows of gate and up than of down: experts that hand their input through have no matrices.
    return fused.shape[0] >= down.shape[0] and fused.shape[1:] == (2 * down.shape[2], down.shape[1])


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
    return dict(module.named_parameters()).get(name)


def _gated(fused: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = fused.chunk(2, dim=-1)
    return activation(gate) * up


def run_block(
    compute: Compute, hidden_states: Tensor, ids: Tensor, weights: Tensor, identities_from: int | None
) -> Tensor:
    """What an experts module's forward returns, by `compute`.

    hidden_states [..., H]; ids and weights [T, k] for the T tokens in it, or of as many elements. Experts
    from `identities_from` on hand their input through; None: there are none.
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids, weights = ids.reshape(x.shape[0], -1), weights.reshape(x.shape[0], -1)
    if identities_from is None:
        return compute(x, ids, weights).reshape(hidden_states.shape)
    passed = ids >= identities_from
    kept = weights.masked_fill(passed, 0.0)
    y = compute(x, ids.masked_fill(passed, 0), kept) + x * (weights - kept).sum(-1, keepdim=True)
    return y.reshape(hidden_states.shape)
