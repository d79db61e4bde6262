"""Mixers whose own code keeps no traceable state, restated in moqc's operators; told by their parameters.

`moqc.frontend.recurrent` knows kernels that transformers gives names to. What is here is written out in a
model's forward, as a loop over blocks or with a state that only the model's own cache carries. The gate
compares each with the original, whole and in pieces.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moqc.frontend.plain_experts import choose


def restate(module: Any, site: str) -> None:
    """Replace the methods of `module` that moqc states itself, in this instance only."""
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    for parts, methods in _RESTATED:
        if parts <= names and all(hasattr(module, name) for name in methods):
            for name, method in methods.items():
                bound = types.MethodType(method, module)
                object.__setattr__(module, name, partial(bound, site) if name == "forward" else bound)
    if getattr(module, "attn_temperature_tuning", False):
        # The model counts positions from the start of a call; moqc's attention applies the factor instead.
        module.moqc_temperature = not module.use_rope
        module.attn_temperature_tuning = False


def _lightning_attention(module: Any, site: str, hidden_states: Tensor, *_rest: Any, **_more: Any) -> Any:
    """Linear attention with one decay a head, written as a loop over blocks of tokens.

    ``slope_rate`` is the decay; the buffers beside it are its powers within a block.
    """
    lead = hidden_states.shape[:-1]
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    qkv = qkv.reshape(*lead, module.num_attention_heads, 3 * module.head_dim)
    q, k, v = (part.contiguous() for part in qkv.split(module.head_dim, dim=3))
    decay = (-module.slope_rate.reshape(1, 1, -1)).expand(*lead, -1).contiguous()
    out = torch.ops.moqc.recurrent(q, k, v, decay, None, None, site).reshape(*lead, -1)
    out = F.sigmoid(module.output_gate(hidden_states)) * module.norm(out)
    return module.out_proj(out), None


def _delayed(x: Tensor, tokens: int, site: str) -> Tensor:
    """X [B, S, C] of so many tokens before; 0 before the first."""
    picked = torch.cat([x.new_ones(x.shape[-1], 1), x.new_zeros(x.shape[-1], tokens)], dim=1)
    delayed: Tensor = torch.ops.moqc.causal_conv(x, picked, None, site)
    return delayed


def _convolved_heads(
    module: Any, site: str, hidden_states: Tensor, *_rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of compressed convolutional attention (arXiv 2510.04476).

    Queries and keys pass a convolution by channels, then one by heads; half of a value is the token before's.
    """
    lead = hidden_states.shape[:-1]
    heads, groups = (*lead, -1, module.head_dim), module.num_key_value_groups
    queries, keys = module.q_proj(hidden_states), module.k_proj(hidden_states)
    own = queries.view(heads) + keys.view(heads).repeat_interleave(groups, dim=-2)
    query_residual = own * 0.5
    key_residual = query_residual.view(*lead, -1, groups, module.head_dim).mean(dim=-2)

    first, second = module.conv_qk_depthwise, module.conv_qk_grouped
    mixed = torch.cat([queries, keys], dim=-1)
    mixed = torch.ops.moqc.causal_conv(mixed, first.weight.squeeze(1), None, f"{site}.conv_qk_depthwise")
    mixed = _by_heads(second, mixed, first.bias, f"{site}.conv_qk_grouped")
    query, key = torch.split(mixed, [queries.shape[-1], keys.shape[-1]], dim=-1)

    before = _delayed(hidden_states, 1, f"{site}.v_proj_delayed")
    value = torch.cat([module.v_proj_current(hidden_states), module.v_proj_delayed(before)], dim=-1)
    return query.view(heads) + query_residual, key.view(heads) + key_residual, value.view(heads)


def _by_heads(conv: Any, x: Tensor, bias: Tensor, site: str) -> Tensor:
    """The grouped convolution `conv` over the tokens of ``x + bias``, which is `bias` before the first."""
    lead, groups = x.shape[:-1], conv.groups
    span = conv.kernel_size[0]
    total: Tensor = conv.bias
    for tap in range(span):
        ago = span - 1 - tap
        there = (_delayed(x, ago, f"{site}.{ago}") if ago else x) + bias
        rows = conv.weight[:, :, tap].reshape(groups, -1, conv.weight.shape[1])
        taken = there.view(*lead, groups, 1, -1) @ rows.transpose(1, 2)
        total = total + taken.reshape(*lead, -1)
    return total


def _routed_queries(module: Any, layer_input: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Mixture of attention heads: one query projection for each expert that a token takes.

    All experts' projections are computed, and those of the chosen ones kept.
    """
    lead, x = layer_input.shape[:-1], layer_input.reshape(-1, layer_input.shape[-1])
    ids, weights = choose(module.router, x)
    stack = module.input_linear.weight
    found = (x @ stack.reshape(-1, stack.shape[2]).T).reshape(-1, stack.shape[0], stack.shape[1])
    chosen = found.gather(1, ids.unsqueeze(2).expand(-1, -1, stack.shape[1]))
    return chosen.reshape(*lead, module.top_k, -1), weights, (ids, weights)


def _merged_heads(module: Any, layer_input: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
    """The counterpart of `_routed_queries`: the weighted sum of the chosen experts' output projections."""
    lead, (ids, weights) = layer_input.shape[:-2], routing
    stack = module.output_linear.weight
    x = layer_input.reshape(*ids.shape, -1) * weights.unsqueeze(2)
    spread = x.new_zeros(ids.shape[0], stack.shape[0], x.shape[2])
    spread = spread.scatter(1, ids.unsqueeze(2).expand(-1, -1, x.shape[2]), x).reshape(ids.shape[0], -1)
    y: Tensor = spread @ stack.transpose(1, 2).reshape(-1, stack.shape[1]) + module.bias
    return y.reshape(*lead, -1)


def _every_token(module: Any, _site: str, hidden_states: Tensor, *_rest: Any, **_more: Any) -> Tensor:
    """The indexer of sparse attention, for sequences so short that it selects every token.

    What it returns only carries their length, for moqc's attention.
    """
    carrier: Any = hidden_states.new_zeros(1, dtype=torch.int32)
    carrier.moqc_most = module.index_topk
    selected: Tensor = carrier
    return selected


Method = Callable[..., Any]
_RESTATED: tuple[tuple[frozenset[str], dict[str, Method]], ...] = (
    (
        frozenset({"slope_rate", "query_decay", "key_decay", "diagonal_decay"}),
        {"forward": _lightning_attention},
    ),
    (frozenset({"conv_qk_depthwise.weight", "conv_qk_grouped.weight"}), {"forward": _convolved_heads}),
    (
        frozenset({"input_linear.weight", "output_linear.weight"}),
        {"map": _routed_queries, "reduce": _merged_heads},
    ),
    (
        frozenset({"wq_b.weight", "wk.weight", "k_norm.weight", "weights_proj.weight"}),
        {"forward": _every_token},
    ),
)
"""Parameters and buffers that a module has, and the methods that moqc states for it."""
