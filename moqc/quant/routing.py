"""Which of a token's experts are worth their work: the rules of online expert pruning, in torch.

A rule looks at one token at a time, so it serves prefill and decode, any batch and any attention kernel. Its
input is what an experts block is called with; its output replaces the expert ids and weights of that call.

A dropped pair has id `DROPPED` and weight 0. Kernels and the reference give a pair with an id outside
``0 .. E - 1`` to no expert: nothing is read or computed for it.

`SitePruning` has the rules that are compiled (`R.moqc.prune_routing`). `LiteralPruning` is MC-MoE's published
procedure (arXiv 2410.06270), which needs the length of the sequence and is for comparison only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

DROPPED = -1
"""Expert id of a dropped pair."""

Kind = Literal["mass", "ratio"]


@dataclass(frozen=True)
class Features:
    """What the rules look at of tokens' hidden states.

    `peaks` [T]: the largest absolute element; `norms` [T]: the sum of all absolute elements; `positions`
    int64 [T]. `gains` [T, k]: by which factor the contribution of each of its experts differs from what is
    usual for that expert, for a rule with slopes.
    """

    peaks: Tensor
    norms: Tensor
    positions: Tensor
    gains: Tensor

    @classmethod
    def of(cls, x: Tensor, positions: Tensor, gains: Tensor) -> Features:
        """The features of the block's input x [T, H]."""
        size = x.abs()
        return cls(size.amax(1), size.sum(1), positions, gains)


@dataclass(frozen=True)
class SitePruning:
    """The pruning of one experts block, calibrated.

    A pair's contribution is ``(|weight| * strength[expert]) ** exponent * exp(slopes[expert] @ x)``, x the
    block's input; `slopes` float16 [E, H], None for zeros.

    * ``mass``: keep what contributes at least `limit`, and the largest contribution in any case.
    * ``ratio``: keep what has at least `limit` of the token's largest contribution.

    An expert of strength 0 is removed: it is never kept. Of a token that must not be pruned every other
    expert is kept; it is one at a position below `first` (attention sinks), with a largest absolute input
    above `peak` (massive activations), or whose two largest weights differ by less than `margin` times their
    sum (the router cannot tell). A token of position below 0 is padding, and keeps nothing.

    `renormalize`: what is kept is scaled to the sum of all, as a model does that divides by the sum.
    """

    kind: Kind
    limit: float
    strength: Tensor
    renormalize: bool
    exponent: float = 1.0
    first: int = 0
    peak: float = math.inf
    margin: float = 0.0
    slopes: Tensor | None = None

    def gains(self, x: Tensor, ids: Tensor) -> Tensor:
        """``exp(slopes[expert] @ x)`` of each pair, float32 [T, k]."""
        return gains(self.slopes, x, ids)

    def contributions(self, features: Features, ids: Tensor, weights: Tensor) -> Tensor:
        """Contribution of each pair, float32 [T, k]; 0 for an id that is no expert."""
        known = (ids >= 0) & (ids < len(self.strength))
        strength = self.strength[torch.where(known, ids, 0)]
        worth = (weights.abs() * strength) ** self.exponent
        if self.slopes is not None:  # a sample's gains are those of the mass rule
            worth = worth * features.gains
        return torch.where(known, worth, 0.0)

    def select(self, features: Features, ids: Tensor, weights: Tensor) -> Tensor:
        """Which pairs are kept, bool [T, k], for ids and weights [T, k]."""
        scores = self.contributions(features, ids, weights)
        chosen = keep_worth(scores, self.limit) if self.kind == "mass" else keep_ratio(scores, self.limit)
        chosen = chosen | self.protected(features, weights)[:, None]
        return chosen & (scores > 0) & (features.positions >= 0)[:, None]

    def protected(self, features: Features, weights: Tensor) -> Tensor:
        """Tokens that must not be pruned, bool [T]."""
        early, massive = features.positions < self.first, features.peaks > self.peak
        return early | massive | (router_margin(weights) < self.margin)


@dataclass(frozen=True)
class LiteralPruning:
    """MC-MoE's pruning as its code does it, on whole windows of tokens of equal length.

    Expert j >= 2 of a token is dropped if ``w_j / w_1 < limit``, except for the 2 % of each window's tokens
    of largest ``I_j = ||x_j||_1 * a_j / (window - j)``, j from 0. a_j should be the attention that token j
    receives; the code sums over the keys instead of the queries, so that a_j is 1. Its layers and medians,
    written down for Mixtral, are not part of it: all layers are pruned, with limits of their own.
    """

    limit: float
    renormalize: bool

    def select(self, features: Features, ids: Tensor, weights: Tensor) -> Tensor:
        """Which pairs are kept, bool [T, k], for ids and weights [T, k] of whole windows."""
        window = int(features.positions.max()) + 1
        importance = (features.norms / (window - features.positions)).reshape(-1, window)
        order = importance.topk(max(1, int(LITERAL_SHARE * window)), dim=1).indices
        protected = torch.zeros(importance.shape, dtype=torch.bool).scatter(1, order, True)
        return keep_ratio(weights.abs(), self.limit) | protected.reshape(-1, 1)


LITERAL_SHARE = 0.02
"""Share of a window's tokens that MC-MoE never prunes."""

Pruning: TypeAlias = SitePruning | LiteralPruning


def prune(
    pruning: Pruning, x: Tensor, ids: Tensor, weights: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The ids and weights [T, k] of the pruned block with input x [T, H] at positions int64 [T]."""
    found = pruning.gains(x, ids) if isinstance(pruning, SitePruning) else torch.ones(ids.shape)
    keep = pruning.select(Features.of(x, positions, found), ids, weights)
    return drop(ids, weights, keep, pruning.renormalize)


def gains(slopes: Tensor | None, x: Tensor, ids: Tensor) -> Tensor:
    """``exp(slopes[expert] @ x)`` of each pair, float32 [T, k], for x [T, H], ids [T, k], `slopes` [E, H].

    1 for an id that is no expert, and without slopes.
    """
    if slopes is None:
        return torch.ones(ids.shape)
    known = (ids >= 0) & (ids < len(slopes))
    # One expert at a time: [T, k, H] would not fit.
    places = torch.where(known, ids, 0)
    found = [(x * slopes[places[:, slot]].to(x.dtype)).sum(1) for slot in range(ids.shape[1])]
    return torch.where(known, torch.stack(found, 1), 0.0).exp()


def keep_worth(scores: Tensor, limit: float) -> Tensor:
    """Those of `scores` [T, k] that are at least `limit`, and the row's largest."""
    return scores >= scores.amax(1, keepdim=True).clamp(max=limit)


def keep_ratio(scores: Tensor, limit: float) -> Tensor:
    """Those of `scores` [T, k] that are at least `limit` of the row's largest."""
    return scores >= limit * scores.amax(1, keepdim=True)


def router_margin(weights: Tensor) -> Tensor:
    """(largest - second) / (largest + second) of each row of `weights` [T, k]; 1 where k is 1."""
    if weights.shape[1] == 1:
        return torch.ones(len(weights))
    top = weights.abs().topk(2, dim=1).values
    return (top[:, 0] - top[:, 1]) / top.sum(1).clamp(min=torch.finfo(top.dtype).tiny)


def drop(ids: Tensor, weights: Tensor, keep: Tensor, renormalize: bool) -> tuple[Tensor, Tensor]:
    """Ids and weights without the pairs that are not kept; see `SitePruning` for `renormalize`."""
    kept = torch.where(keep, weights, 0.0)
    if renormalize:
        total = kept.sum(1, keepdim=True)
        kept = kept * torch.where(total == 0, 1.0, weights.sum(1, keepdim=True) / total)
    return torch.where(keep, ids, DROPPED), kept


def renormalizes(weights: Tensor) -> bool:
    """Whether rows of `weights` [T, k] have one sum, as a model's that divides by it have.

    Their standard deviation may be 1e-3 of their mean: routers may compute in bfloat16.
    """
    sums = weights.double().sum(1)
    return bool(sums.std(correction=0) <= 1e-3 * sums.mean().abs())
