"""Build calls of moqc's operators; `moqc.ir.ops` registers them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import relax
from tvm.ir import Op, make_node

from moqc.ir.calls import (
    ATTENTION,
    CACHED_ATTENTION,
    CACHED_CAUSAL_CONV,
    CACHED_RECURRENT,
    CAUSAL_CONV,
    EMBEDDING,
    EXPERTS,
    LINEAR,
    MIXED_EXPERTS,
    PRUNE_ROUTING,
    RECURRENT,
)
from moqc.quant.layouts import DEFAULT


def _call(name: str, arguments: Sequence[relax.Expr], **attrs: Any) -> relax.Call:
    return relax.Call(Op.get(name), list(arguments), attrs=make_node("ir.DictAttrs", **attrs))


def _limits(**values: int) -> dict[str, int]:
    """The attributes among `values` that say something: 0 is left out."""
    return {name: value for name, value in values.items() if value}


def experts(
    x: relax.Expr,
    ids: relax.Expr,
    weights: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    activation: str,
    operands: Sequence[str],
) -> relax.Call:
    """One MoE layer's routed experts before quantization.

    A pair with an id outside ``0 .. E - 1`` is dropped: kernels read and compute nothing for it.
    ``y[t] = sum_j weights[t,j] * (down[e] @ act(gate[e] @ x[t], up[e] @ x[t]) + biases)`` with
    ``e = ids[t,j]``. `tensors` are `operands` (a subsequence of `EXPERT_OPERANDS`): gate and up [E,I,H],
    down [E,H,I], gate_bias and up_bias [E,I], down_bias [E,H]. `activation` is a name of
    `moqc.quant.activations`.
    """
    names = list(operands)
    return _call(EXPERTS, (x, ids, weights, *tensors), site=site, activation=activation, operands=names)


def mixed_experts(
    x: relax.Expr,
    ids: relax.Expr,
    weights: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    activation: str,
    activations: str,
    operands: Sequence[str],
    classes: Sequence[str],
    intermediate: int,
    layout: str = DEFAULT,
    removed: Sequence[int] = (),
    hidden: int = 0,
) -> relax.Call:
    """The routed experts of one layer with packed weights, grouped into bit classes.

    `operands` begin with ``table`` (int32 [3,E,2]: projection gate/up/down, expert -> class within the
    projection, index in the class), then ``gate.0.codes`` (uint8), ``gate.0.scales`` (float16),
    ``gate.0.zeros`` (uint8, absent when symmetric), ..., then the biases. The packed tensors are stacks of
    matrices in `layout`, of `moqc.quant.layouts`. `classes` lists ``projection:format`` in the order of the
    operands, `activations` is ``float`` or ``int8``, `intermediate` the unpadded I. Experts in `removed` are
    in no class; pruning must not keep them, and their entries in the table mean nothing. `hidden`, if not 0,
    is the width of the result where that of `x` is another: where gate and up have protected channels.
    """
    attrs = {"hidden": hidden} if hidden else {}
    return _call(
        MIXED_EXPERTS,
        (x, ids, weights, *tensors),
        site=site,
        activation=activation,
        activations=activations,
        operands=list(operands),
        classes=list(classes),
        intermediate=intermediate,
        layout=layout,
        removed=list(removed),
        **attrs,
    )


def prune_routing(
    x: relax.Expr,
    ids: relax.Expr,
    weights: relax.Expr,
    positions: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    rule: str,
    exponent: str,
    renormalize: int,
    first: int,
    operands: Sequence[str],
) -> relax.Call:
    """Drop the experts of each token that are not worth their work; (ids, weights) of the pruned block.

    The arithmetic is that of `moqc.quant.routing.SitePruning`: `rule` is ``mass`` or ``ratio``, `exponent` a
    float's repr. A dropped pair has id -1 and weight 0, which every lowering of the experts blocks must skip:
    no weights read, no row computed. `operands` are strength float32 [E], limits float32 [3]: limit, peak and
    margin, and in some cases slopes float16 [E, H]. `positions` is int64 [T]; a token of position < 0 is
    padding and loses all its experts.
    """
    attrs = {"site": site, "rule": rule, "exponent": exponent, "renormalize": renormalize, "first": first}
    return _call(PRUNE_ROUTING, (x, ids, weights, positions, *tensors), **attrs, operands=list(operands))


def linear(
    x: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    format: str,
    rows: int,
    activations: str,
    operands: Sequence[str],
    layout: str = DEFAULT,
) -> relax.Call:
    """``x @ W.T + bias`` with W [rows, K] packed in `layout`; operands are codes, scales, zeros?, bias?."""
    attrs = {"site": site, "format": format, "rows": rows, "activations": activations, "layout": layout}
    return _call(LINEAR, (x, *tensors), **attrs, operands=list(operands))


def embedding(
    ids: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    format: str,
    columns: int,
    operands: Sequence[str],
    layout: str = DEFAULT,
) -> relax.Call:
    """``W[ids]`` with W [vocabulary, columns] packed in `layout`; operands are codes, scales, zeros?."""
    attrs = {"site": site, "format": format, "columns": columns, "layout": layout}
    return _call(EMBEDDING, (ids, *tensors), **attrs, operands=list(operands))


def attention(
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    positions: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    scale: str,
    window: int,
    softcap: str,
    causal: int,
    operands: Sequence[str],
    chunk: int = 0,
    most: int = 0,
    latent: int = 0,
) -> relax.Call:
    """Attention over the tokens of this call.

    Token i attends key j iff ``positions[j] <= positions[i]`` (when `causal`) and
    ``positions[j] > positions[i] - window`` (when `window` is not 0) and, when `chunk` is not 0, both divided
    by `chunk` have one quotient; a key of position < 0 is padding and never attended. `positions` is int64
    [B,S]; scores are multiplied by `scale` and, unless `softcap` is ``0.0``, passed through
    ``softcap * tanh(score / softcap)``. The only further operand is ``sinks`` [H]. A `most` that is not 0
    bounds the context: of more positions than that the model would select some, which is not this operator.
    With `latent` the keys end in the values: k has as many columns fewer than q as v has.
    """
    attrs = {"site": site, "scale": scale, "window": window, "softcap": softcap, "causal": causal}
    attrs |= _limits(chunk=chunk, most=most, latent=latent)
    return _call(ATTENTION, (q, k, v, positions, *tensors), **attrs, operands=list(operands))


def cached_attention(
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    positions: relax.Expr,
    k_cache: relax.Expr,
    v_cache: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    scale: str,
    window: int,
    softcap: str,
    causal: int,
    operands: Sequence[str],
    chunk: int = 0,
    most: int = 0,
    latent: int = 0,
) -> relax.Call:
    """Write k and v into the cache slots `positions`, attend slots 0..position; returns the caches too."""
    attrs = {"site": site, "scale": scale, "window": window, "softcap": softcap, "causal": causal}
    attrs |= _limits(chunk=chunk, most=most, latent=latent)
    arguments = (q, k, v, positions, k_cache, v_cache, *tensors)
    return _call(CACHED_ATTENTION, arguments, **attrs, operands=list(operands))


def recurrent(
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    decay: relax.Expr,
    positions: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    operands: Sequence[str],
) -> relax.Call:
    """A linear recurrence over the tokens of this call, as `moqc.quant.recurrence.recurrent` states it.

    q and k [B,S,Hk,K], v [B,S,H,V], decay [B,S,H] or [B,S,H,K], positions int64 [B,S]. `operands` are among
    ``beta`` [B,S,H] (the delta rule) and ``rate`` [H,K] (factors of the decay), in this order. A token of
    position < 0 is padding, one of position 0 starts with an empty state.
    """
    return _call(RECURRENT, (q, k, v, decay, positions, *tensors), site=site, operands=list(operands))


def cached_recurrent(
    q: relax.Expr,
    k: relax.Expr,
    v: relax.Expr,
    decay: relax.Expr,
    positions: relax.Expr,
    state: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    operands: Sequence[str],
) -> relax.Call:
    """The recurrence continued from `state` [B,H,K,V], which is returned as it is after the last token."""
    arguments = (q, k, v, decay, positions, state, *tensors)
    return _call(CACHED_RECURRENT, arguments, site=site, operands=list(operands))


def causal_conv(
    x: relax.Expr,
    weight: relax.Expr,
    positions: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    operands: Sequence[str],
) -> relax.Call:
    """Every channel of x [B,S,C] convolved with its row of weight [C,W] over the W latest tokens.

    The only further operand is ``bias`` [C]. Positions int64 [B,S] mean what they mean to `recurrent`.
    """
    return _call(CAUSAL_CONV, (x, weight, positions, *tensors), site=site, operands=list(operands))


def cached_causal_conv(
    x: relax.Expr,
    weight: relax.Expr,
    positions: relax.Expr,
    state: relax.Expr,
    *tensors: relax.Expr,
    site: str,
    operands: Sequence[str],
) -> relax.Call:
    """The convolution continued from `state` [B,W-1,C], the latest tokens, oldest first; returns it too."""
    arguments = (x, weight, positions, state, *tensors)
    return _call(CACHED_CAUSAL_CONV, arguments, site=site, operands=list(operands))
