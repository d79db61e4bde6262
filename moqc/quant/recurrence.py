"""The oracle of recurrent mixers: a linear recurrence with decay, and a causal convolution, token by token.

One recurrence covers what hybrid models call Mamba, Mamba-2, gated delta net, Kimi delta attention and
lightning attention: a matrix of state [K, V] a head that decays, takes up the outer product of a key and a
value (or, by the delta rule, of the key and what the value adds to what the state has for that key), and is
read with a query. Positions decide: a token of position below 0 is padding and touches nothing, one of
position 0 starts a sequence with an empty state.
"""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    positions: Tensor,
    *,
    beta: Tensor | None = None,
    rate: Tensor | None = None,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence over the tokens of a call; returns out [B, S, H, V] and the state after it.

    Args:
        q: queries [B, S, Hk, K], float32 like the others; value head h reads query and key head h * Hk // H.
        k: keys [B, S, Hk, K].
        v: values [B, S, H, V].
        decay: logarithm of the factor of the state before each token, [B, S, H] or one a key [B, S, H, K].
        positions: int64 [B, S].
        beta: [B, S, H]; given, the state takes up ``beta * (v - state^T k)`` instead of v (delta rule).
        rate: [H, K]; given, the logarithm is ``decay[..., None] * rate``.
        state: [B, H, K, V] before the first token; None is zero.

    """
    batch, tokens, heads, width = v.shape
    groups = heads // k.shape[2]
    q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
    logarithm = decay if decay.dim() == 4 else decay.unsqueeze(-1)
    logarithm = logarithm if rate is None else logarithm * rate
    now = v.new_zeros(batch, heads, k.shape[3], width) if state is None else state
    out = torch.zeros_like(v)
    for token in range(tokens):
        before = torch.where(_at(positions, token) == 0, torch.zeros_like(now), now)
        after = before * logarithm[:, token].exp().unsqueeze(-1)
        key, value = k[:, token], v[:, token]
        if beta is not None:
            known = torch.einsum("bhkv,bhk->bhv", after, key)
            value = beta[:, token].unsqueeze(-1) * (value - known)
        after = after + key.unsqueeze(-1) * value.unsqueeze(-2)
        real = _at(positions, token) >= 0
        read = torch.einsum("bhkv,bhk->bhv", after, q[:, token])
        out[:, token] = torch.where(real[..., 0], read, torch.zeros_like(read))
        now = torch.where(real, after, now)
    return out, now


def causal_conv(
    x: Tensor, weight: Tensor, positions: Tensor, *, bias: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel of `x` [B, S, C] convolved with its own `weight` [C, W] over the W latest tokens.

    `positions` is int64 [B, S], `bias` [C]; `state` [B, W - 1, C] holds the tokens before, oldest first (None
    is zero). Returns out [B, S, C] and the state after the call.
    """
    batch, tokens, channels = x.shape
    window = weight.shape[1] - 1
    now = x.new_zeros(batch, window, channels) if state is None else state
    out = torch.zeros_like(x)
    for token in range(tokens):
        place = positions[:, token].reshape(-1, 1, 1)
        before = torch.where(place == 0, torch.zeros_like(now), now)
        seen = torch.cat([before, x[:, token : token + 1]], 1)
        mixed = torch.einsum("bwc,cw->bc", seen, weight)
        mixed = mixed if bias is None else mixed + bias
        out[:, token] = torch.where(place[:, 0] >= 0, mixed, torch.zeros_like(mixed))
        now = torch.where(place >= 0, seen[:, 1:], now)
    return out, now


def _at(positions: Tensor, token: int) -> Tensor:
    """Positions of one token as [B, 1, 1, 1]."""
    return positions[:, token].reshape(-1, 1, 1, 1)
