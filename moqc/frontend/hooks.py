"""Hooks that make a transformers model call two operators: moqc::experts and moqc::attention.

transformers looks implementations of experts blocks and of attention up in registries. moqc's own
implementations, registered under "moqc", call one custom operator each, so that `torch.export` sees one node
a block, with the router left in plain sight before it. Instead of masks the model's code gets a mark with the
rule that the mask would follow (`moqc.frontend.masks`), which comes back with the call of attention.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import transformers
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from moqc.errors import ModelError
from moqc.frontend import latents, masks
from moqc.frontend.experts import ExpertLayout, find_layouts
from moqc.frontend.mixers import restate
from moqc.frontend.plain_experts import route_scaled, run_plain
from moqc.frontend.recurrent import rebind
from moqc.quant import reference

IMPLEMENTATION = "moqc"

_MEANINGS = {"position_bias": "a bias on its scores that depends on the tokens (position_bias)"}
# Tensors some models hand to attention although their attention has used them already.
_SPENT = frozenset(
    {"position_ids", "cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "position_embeddings"}
)


@torch.library.custom_op("moqc::experts", mutates_args=())
def experts_operator(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    gate_bias: torch.Tensor | None,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    site: str,
    activation: str,
) -> torch.Tensor:
    """X [T, H], ids and weights [T, k], canonical weights -> [T, H]. Runs the float reference."""
    return reference.experts(
        x,
        ids,
        weights,
        gate,
        up,
        down,
        activation=activation,
        gate_bias=gate_bias,
        up_bias=up_bias,
        down_bias=down_bias,
    ).to(x.dtype)


@experts_operator.register_fake
def _(x: torch.Tensor, *_rest: Any) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("moqc::attention", mutates_args=())
def attention_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    site: str,
    scale: float,
    window: int,
    chunk: int,
    most: int,
    softcap: float,
    causal: bool,
    latent: bool,
) -> torch.Tensor:
    """Q [B, H, S, D], k [B, Hk, S, D], v [B, Hk, S, Dv], sinks [H] -> [B, S, H, Dv].

    Keys that are `latent` end in the values: k has D - Dv columns.

    Token i sits at position i: padding and caches are the compiled operator's matter. `most` is not 0 for a
    model that selects so many tokens of a longer sequence, which this does not.
    """
    k = torch.cat([k, v], -1) if latent else k
    tokens, groups = q.shape[2], q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    at = torch.arange(tokens, device=q.device)
    allowed = (
        at[None] <= at[:, None] if causal else torch.ones(tokens, tokens, dtype=torch.bool, device=q.device)
    )
    if window:
        allowed = allowed & (at[None] > at[:, None] - window)
    if chunk:
        allowed = allowed & (at[None] // chunk == at[:, None] // chunk)
    scores = scores.masked_fill(~allowed, float("-inf"))
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, tokens, 1)
        scores = torch.cat([scores, column.to(scores.dtype)], -1)
    shares = torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype)[..., :tokens]
    return (shares @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous()


@attention_operator.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_rest: Any) -> torch.Tensor:
    batch, heads, tokens, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[-1]))


@torch.library.custom_op("moqc::positions", mutates_args=())
def positions_operator(like: torch.Tensor) -> torch.Tensor:
    """Positions int64 [B, S] of the tokens of `like` [B, H, S, D]: the compiled model's second input."""
    return torch.arange(like.shape[2], device=like.device).repeat(like.shape[0], 1)


@positions_operator.register_fake
def _(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty((like.shape[0], like.shape[2]), dtype=torch.int64)


def _experts_forward(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts module's forward: the operator on its canonical parameters (`canonicalize`)."""
    layout: ExpertLayout = self.moqc_layout
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    operands = [getattr(self, name) if name in layout.operands else None for name in names]
    found: torch.Tensor = torch.ops.moqc.experts(
        hidden_states, top_k_index, top_k_weights, *operands, layout.site, layout.activation
    )
    return found


def _plain_forward(self: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """The same for a module that transformers' interface does not know."""
    return run_plain(self, partial(_experts_forward, self), *inputs)


def _attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    is_causal: bool | None = None,
    indices: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface. Raises ModelError for arguments that the operator does not model."""
    site, rule = module.moqc_site, masks.rule_of(attention_mask)
    sinks = s_aux if s_aux is not None else sinks
    most = 0 if indices is None else getattr(indices, "moqc_most", None)
    if unknown := list(_unmodelled(rule, dropout, sinks, most, others)):
        raise ModelError(
            f"{site}: {type(module).__name__} uses {', '.join(unknown)}, which moqc does not model"
        )
    assert rule is not None
    assert most is not None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = min((size for size in (int(sliding_window or 0), rule.window) if size), default=0)
    if getattr(module, "moqc_temperature", False):
        query = query * _temperature(module, query)
    latent = latents.is_latent(module)
    query = latents.absorb(module, query) if latent else query
    settings = (scale, window, rule.chunk, most, float(softcap or 0.0), bool(causal), latent)
    found: torch.Tensor = torch.ops.moqc.attention(query, key, value, sinks, site, *settings)
    return latents.expand(module, found) if latent else found, None


def _unmodelled(
    rule: masks.Rule | None,
    dropout: float,
    sinks: torch.Tensor | None,
    most: int | None,
    others: dict[str, Any],
) -> Iterator[str]:
    """What attention is given that the operator has no place for."""
    given = sorted(n for n, v in others.items() if isinstance(v, torch.Tensor) and n not in _SPENT)
    yield from (_MEANINGS.get(name, name) for name in given)
    if rule is None:
        yield "a mask that it computes, none of transformers' causal, window and chunk masks"
    if dropout:
        yield "dropout"
    if sinks is not None and sinks.dim() != 1:
        yield "sinks that depend on the input"
    if most is None:
        yield "indices"


def _temperature(module: Any, query: torch.Tensor) -> torch.Tensor:
    """The factor [B, 1, S, 1] of queries that grows with the position (arXiv 2501.19399)."""
    places = torch.ops.moqc.positions(query).float().clamp(min=0.0) + 1.0
    steps = torch.floor(places / module.floor_scale)
    factor: torch.Tensor = torch.log1p(steps) * module.attn_scale + 1.0
    return factor[:, None, :, None]


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _experts_forward)
ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention_forward)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, masks.mark)


def hook(model: transformers.PreTrainedModel, *, latent: bool = False) -> tuple[ExpertLayout, ...]:
    """Make `model` call moqc's operators, in place; returns the layouts of its experts blocks.

    `latent`: attention that compresses keys and values works on what is compressed (`moqc.frontend.latents`).

    The parameters of every experts module are replaced by canonical ones, ``<site>.gate``, ``.up``, ``.down``
    and biases (meta stays meta). Persistent buffers become parameters, because checkpoints hold them.
    Raises ModelError for a model without experts blocks or with one that moqc does not model.
    """
    layouts = find_layouts(model, model.config.model_type)
    for name, module in model.named_modules():
        module.moqc_site = name
        rebind(module, name)
        restate(module, name)
        route_scaled(module)
        if latent:
            latents.keep(module)
    for layout in layouts:
        canonicalize(model.get_submodule(layout.site), layout)
    persistent = set(model.state_dict()) - {
        name for name, _ in model.named_parameters(remove_duplicate=False)
    }
    for name in persistent:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        tensor = owner.get_buffer(leaf)
        delattr(owner, leaf)
        owner.register_parameter(leaf, torch.nn.Parameter(tensor, requires_grad=False))
    model.set_attn_implementation(IMPLEMENTATION)
    model.set_experts_implementation(IMPLEMENTATION)
    return layouts


@torch.no_grad()
def canonicalize(module: torch.nn.Module, layout: ExpertLayout) -> None:
    """Replace the parameters of an experts module by the canonical operands of `layout`."""
    stored = dict(module.named_parameters())
    made = {
        operand: layout.take(
            stored[layout.source(operand).removeprefix(f"{layout.site}.")], operand
        ).contiguous()
        for operand in layout.operands
    }
    for name in {layout.source(operand).removeprefix(f"{layout.site}.") for operand in layout.operands}:
        path, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(path), leaf)
    for name, tensor in made.items():
        module.register_parameter(name, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    module.moqc_layout = layout  # type: ignore[assignment]
    if layout.form:
        object.__setattr__(module, "forward", types.MethodType(_plain_forward, module))
