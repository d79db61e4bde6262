"""How much to skip where: limits of a pruning rule for a share of the experts' work, from measured errors.

A `RoutingSample` holds what is needed to tell the error of any pruning of a block exactly, without running
it again: the inner products of the outputs of each token's experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from moqc.errors import UserError
from moqc.quant.routing import (
    Features,
    LiteralPruning,
    Pruning,
    SitePruning,
    drop,
    renormalizes,
    router_margin,
)

RULES: dict[str, str] = {
    "mass": "experts whose contribution, predicted from the token, is worth it; one budget for all layers",
    "odp": "MC-MoE's ratio of routing weights, the same share in every layer, protection by token features",
    "odp-literal": "MC-MoE's ratio with its published token protection; for comparison only",
    "topk-threshold": "one ratio of routing weights for all layers, no protection",
}
"""Rule of ``--prune-rule`` -> what it does."""

EXPONENT = 2.0
"""A contribution is a squared norm: outputs of different experts are nearly orthogonal, so theirs add up."""
FIRST = 4
"""Positions that attention sinks on are among the first few (arXiv 2309.17453 keeps four)."""
PEAK = 5.0
"""A massive activation is so many times the median token's largest input."""
UNSURE = 0.02
"""Share of tokens, those of the least router margin, that are not pruned."""
GRID = 64
ROUNDS = 40


@dataclass(frozen=True)
class RoutingSample:
    """Tokens of one experts block with E experts: whole windows, in order.

    `ids` int64 and `weights` float32 [T, k]; `grams` float32 [T, k, k], the inner products of the outputs of
    the token's experts; `features` of the block's input. `sensitivity` float32 [T]: nats that the loss rises
    by per squared error of the block's output at this token. `strength` [E] and `slopes` float16 [E, H] are
    those of the mass rule's contributions.
    """

    ids: Tensor
    weights: Tensor
    grams: Tensor
    features: Features
    sensitivity: Tensor
    strength: Tensor
    slopes: Tensor

    @property
    def experts(self) -> int:
        """E."""
        return len(self.strength)

    @cached_property
    def renormalize(self) -> bool:
        """Whether the model's routing weights have a constant sum."""
        return self.weights.shape[1] > 1 and renormalizes(self.weights)

    def keep(self, pruning: Pruning) -> Tensor:
        """Which pairs `pruning` keeps, bool [T, k]."""
        return pruning.select(self.features, self.ids, self.weights)

    def harm(self, keep: Tensor, renormalize: bool) -> float:
        """By how many nats, summed over the tokens, the loss rises if only the pairs `keep` are computed.

        To second order, of the block's error alone: ``Σ_t sensitivity_t ‖Δy_t‖²``.
        """
        kept = drop(self.ids, self.weights, keep, renormalize)[1]
        errors = _quadratic(self.grams, self.weights - kept).clamp(min=0)
        return float((self.sensitivity * errors).double().sum())

    def skipped(self, pruning: Pruning) -> float:
        """Share of the pairs that `pruning` drops."""
        return float((~self.keep(pruning)).float().mean())


def _quadratic(grams: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("ti,tij,tj->t", weights, grams, weights)


Samples = Mapping[str, RoutingSample]


def most_share(samples: Samples) -> float:
    """The largest share of the work that can be skipped: all but one expert of every token."""
    kept = sum(len(sample.ids) for sample in samples.values())
    return 1 - kept / sum(sample.ids.numel() for sample in samples.values())


def calibrate(rule: str, samples: Samples, share: float) -> dict[str, Pruning]:
    """The prunings, by site, with which `rule` skips `share` of the (token, expert) pairs of all `samples`.

    Raises UserError for an unknown rule or a share out of reach.
    """
    if rule not in RULES:
        raise UserError(f"unknown pruning rule {rule!r}: known are {', '.join(RULES)}")
    if not 0 < share <= 0.95 * most_share(samples):
        raise UserError(
            f"cannot skip {share:.1%} of the experts' work: one expert of every token is kept, so that the "
            f"most is {0.95 * most_share(samples):.1%}"
        )
    if rule == "mass":
        return _budgeted(samples, share)
    if rule == "topk-threshold":
        plain = {site: _ratio(sample, protect=False) for site, sample in samples.items()}
        return _common(samples, lambda limit: {s: replace(p, limit=limit) for s, p in plain.items()}, share)
    found: dict[str, Pruning] = {}
    for site, sample in samples.items():
        base = (
            LiteralPruning(0.0, sample.renormalize) if rule == "odp-literal" else _ratio(sample, protect=True)
        )

        def prunings(limit: float, site: str = site, base: Pruning = base) -> dict[str, Pruning]:
            return {site: replace(base, limit=limit)}

        found |= _common({site: sample}, prunings, share)
    return found


def _ratio(sample: RoutingSample, *, protect: bool) -> SitePruning:
    plain = SitePruning("ratio", 0.0, torch.ones(sample.experts), sample.renormalize)
    return _protected(plain, sample) if protect else plain


def _protected(pruning: SitePruning, sample: RoutingSample) -> SitePruning:
    """`pruning` with the protection of tokens calibrated on `sample`."""
    margins = router_margin(sample.weights)
    unsure = float(margins.quantile(UNSURE)) if sample.ids.shape[1] > 1 else 0.0
    return replace(pruning, first=FIRST, peak=PEAK * float(sample.features.peaks.median()), margin=unsure)


def skipped(samples: Samples, prunings: Mapping[str, Pruning]) -> float:
    """Share of all pairs that `prunings` drop."""
    dropped = sum(
        samples[site].skipped(pruning) * samples[site].ids.numel() for site, pruning in prunings.items()
    )
    return dropped / sum(samples[site].ids.numel() for site in prunings)


def _common(
    samples: Samples, prunings: Callable[[float], dict[str, Pruning]], share: float
) -> dict[str, Pruning]:
    """The prunings of the parameter in 0 .. 1, in which the skipped share grows, that skips `share`."""
    low, high = 0.0, 1.0
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if skipped(samples, prunings(middle)) < share:
            low = middle
        else:
            high = middle
    return prunings(high)


def _budgeted(samples: Samples, share: float) -> dict[str, Pruning]:
    """Mass prunings of least total harm: limits on the lower hulls of (pairs skipped, harm) by site."""
    curves = {site: _Curve.measure(sample) for site, sample in samples.items()}
    total = sum(sample.ids.numel() for sample in samples.values())
    low, high = 1e-30, 1e30
    for _ in range(4 * ROUNDS):
        price = math.sqrt(low * high)
        if sum(curve.skipped[curve.cheapest(price)] for curve in curves.values()) < share * total:
            low = price
        else:
            high = price
    less, more = ({s: c.limits[c.cheapest(price)] for s, c in curves.items()} for price in (low, high))
    bases = {site: curve.base for site, curve in curves.items()}

    def between(part: float) -> dict[str, Pruning]:
        return {s: replace(b, limit=(1 - part) * less[s] + part * more[s]) for s, b in bases.items()}

    return _common(samples, between, share)


@dataclass(frozen=True)
class _Curve:
    """What pruning one site by mass costs: pairs skipped and harm at each of `limits`, all rising."""

    base: SitePruning
    limits: list[float]
    skipped: list[float]
    harm: list[float]

    @classmethod
    def measure(cls, sample: RoutingSample) -> _Curve:
        """The curve on `sample`: limits in equal numbers of pairs between two."""
        # Scaling what is left, as the model would, doubles the error (docs/methods.md): weights stay.
        base = SitePruning("mass", 0.0, sample.strength, False, EXPONENT, slopes=sample.slopes)
        scores = base.contributions(sample.features, sample.ids, sample.weights)
        base = _protected(base, sample)
        others = scores.sort(dim=1, descending=True).values[:, 1:].flatten()
        steps = torch.quantile(others[:: max(1, others.numel() >> 18)], torch.linspace(0, 1, GRID))
        limits, skips, harm = [0.0], [0.0], [0.0]
        for limit in steps.tolist():
            keep = sample.keep(replace(base, limit=limit))
            limits.append(limit)
            skips.append(float((~keep).sum()))
            harm.append(sample.harm(keep, base.renormalize))
        return cls(base, limits, skips, harm)

    def cheapest(self, price: float) -> int:
        """Index of the limit of least ``harm - price * skipped``."""
        return min(range(len(self.limits)), key=lambda at: self.harm[at] - price * self.skipped[at])
