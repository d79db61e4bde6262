"""Experts modules outside of transformers' experts interface, told by their parameters and their forward.

Every form has a test on a module's parameters and a forward that ends in a call of moqc's operator. A module
that passes is marked like one that transformers decorates; whether that was right the gate finds out.

* stacked: ``gate_up_proj`` and ``down_proj`` of three dimensions, and a forward that takes the routing;
* rows: ``w1``, ``v1`` and ``w2`` of a child with all experts' rows below each other, and the same forward;
* scaled: stacked too, but a forward that takes all tokens for each expert, times their routing weights;
* linears: a block that holds its router beside two stacks of linears.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""x [T, H], ids [T, k], weights [T, k] -> [T, H]: the experts of one block."""

PARAMETERS: Mapping[str, Mapping[str, str]] = {
    "rows": {"gate": "mlp.w1", "up": "mlp.v1", "down": "mlp.w2"},
    "linears": {"gate": "input_linear.weight", "up": "input_linear.weight", "down": "output_linear.weight"},
}
"""Where a form keeps gate, up and down, if not under the names of decorated modules.

The parameters of ``rows`` are [E * I, H] each, down transposed.
"""


def mark(module: Any) -> None:
    """Give a plain experts module the marks of a decorated one; leave any other alone."""
    if hasattr(module, "has_gate"):
        return
    form = _form(module)
    if form is None:
        return
    if _activation(module, form) is None:
        return
    module.has_gate, module.has_bias, module.is_concatenated = True, False, True
    module.is_transposed = form == "scaled"
    module.moqc_form = form
    object.__setattr__(module, "_apply_gate", types.MethodType(_apply_gate, module))


def route_scaled(block: Any) -> None:
    """Let the parent of experts of the form ``scaled`` hand them only the tokens that are routed to them."""
    if getattr(getattr(block, "experts", None), "moqc_form", "") == "scaled":
        object.__setattr__(block, "forward", types.MethodType(_scaled_block, block))


def _form(module: Any) -> str | None:
    arguments = list(inspect.signature(type(module).forward).parameters)[1:]
    if arguments == ["hidden_states", "top_k_index", "top_k_weights"]:
        if _stacked(module, "gate_up_proj", "down_proj"):
            return "stacked"
        rows = all(_parameter(module, name) is not None for name in PARAMETERS["rows"].values())
        return "rows" if rows else None
    if arguments == ["hidden_states"] and _stacked(module, "gate_up_proj", "down_proj", transposed=True):
        return "scaled"
    if len(arguments) == 1 and _stacked(module, "input_linear.weight", "output_linear.weight"):
        return "linears" if _top_k(module) else None
    return None


def _stacked(module: Any, first: str, second: str, *, transposed: bool = False) -> bool:
    fused, down = (_parameter(module, name) for name in (first, second))
    if fused is None or down is None or fused.dim() != 3 or down.dim() != 3:
        return False
    _, rows, columns = fused.transpose(1, 2).shape if transposed else fused.shape
    _, hidden, intermediate = down.transpose(1, 2).shape if transposed else down.shape
    # More rows of gate and up than of down: experts that hand their input through have no matrices.
    return fused.shape[0] >= down.shape[0] and (rows, columns) == (2 * intermediate, hidden)


def _parameter(module: torch.nn.Module, name: str) -> torch.nn.Parameter | None:
    return dict(module.named_parameters()).get(name)


def _top_k(block: Any) -> bool:
    """Whether a block has a router of a linear and a number of experts to choose."""
    router = getattr(block, "router", None)
    return isinstance(getattr(router, "layer", None), torch.nn.Linear) and hasattr(router, "top_k")


def _activation(module: Any, form: str) -> Callable[[Tensor], Tensor] | None:
    owner = module.mlp if form == "rows" else module
    found = (getattr(owner, name, None) for name in ("activation_fn", "act_fn", "activation"))
    return next((function for function in found if function is not None), None)


def _apply_gate(module: Any, fused: Tensor) -> Tensor:
    activation = _activation(module, module.moqc_form)
    assert activation is not None  # or it would not have been marked
    gate, up = fused.chunk(2, dim=-1)
    return activation(gate) * up


def run_plain(module: Any, compute: Compute, *inputs: Tensor) -> Tensor:
    """What a plain experts module's forward returns for `inputs`, by `compute`."""
    if module.moqc_form == "linears":
        x = inputs[0].reshape(-1, inputs[0].shape[-1])
        y = compute(x, *choose(module.router, x)).reshape(inputs[0].shape)
        bias: Tensor | None = getattr(module, "bias", None)
        return y if bias is None else y + bias
    hidden_states, ids, weights = inputs
    return run_block(compute, hidden_states, ids, weights, module.moqc_layout.identities_from)


def choose(router: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and weights [T, k] of a router of the form ``linears``: the softmax of the largest scores."""
    scores, ids = router.layer(x).float().topk(router.top_k, dim=1)
    return ids, torch.softmax(scores, dim=1).type_as(x)


def _scaled_block(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """A block whose experts get their input, not their output, times the routing weight."""
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    scores, logits = block.router(x)
    weights, ids = scores.topk(block.router.top_k, dim=1)
    rows = (x.unsqueeze(1) * weights.unsqueeze(2)).reshape(-1, x.shape[1])
    ids = ids.reshape(-1, 1)
    routed = block.experts(rows, ids, torch.ones_like(ids, dtype=x.dtype))
    routed = routed.reshape(x.shape[0], block.router.top_k, x.shape[1]).sum(1)
    return block.shared_expert(x) + routed, logits


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
