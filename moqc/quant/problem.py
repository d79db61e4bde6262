"""The bit-allocation problem: which format every projection of every expert gets, under a size budget.

Plain arrays, so that allocators are pure functions and can be tested against brute force. U units, F formats,
S sites, E experts of a site.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moqc.errors import BudgetError, InternalError
from moqc.quant.formats import Format

PROJECTIONS = ("gate", "up", "down")
MCMOE_BITS = (1, 2, 3)
"""Code widths MC-MoE chooses from; the columns of `Problem.block_errors`."""

SPENT_SHARE = 0.9
"""Share of a budget that the largest plan must spend."""


@dataclass(frozen=True, eq=False)
class Problem:
    """An instance. A unit is one projection of one expert of one site.

    * `unit_site`, `unit_expert`, `unit_projection`: int64 [U], indices into `sites`, the site's experts, and
      `PROJECTIONS`.
    * `costs`: float64 [U, F], harm of storing the unit in the format, additive over units; all zero when no
      cost was measured.
    * `sizes`: int64 [U, F], stored bits; `weights`: int64 [U], number of weights.
    * `budget_bits`: stored bits allowed in all; `overhead_bits` of them (the expert tables) are spent anyway.
    * `frequency`: one float array [E] a site, share of the site's pairs; `router_weight`: likewise, the sum
      of the routing weights given to the expert over the number of tokens. None without a profile.
    * `block_errors`: one float array [E, 3] a site, Frobenius norm of the change of the block's output when
      one expert is quantized to 1, 2, 3 bits (`MCMOE_BITS`); `gradient_errors`: likewise, the squared change
      weighted by the squared gradient of the loss. None unless measured.
    * `significance`: one float array [E] a site, MoQa's significance of each expert. `entropy` and
      `similarity`: float [S], of a block's weights, and of the residual stream before and after a block.
      `outliers`: float [U], outlier score of each matrix. None unless measured.
    * `latency`: float64 [U, F], expected time a token of the unit in the format, same unit as
      `latency_budget`, which bounds its sum. None: not constrained.
    * `allowed`: bool [U, F], formats a unit may have, at least one each; None: all. `max_classes`: most
      formats that the units of a site may have between them. Only the global allocator heeds these two.
    """

    sites: tuple[str, ...]
    unit_site: NDArray[np.int64]
    unit_expert: NDArray[np.int64]
    unit_projection: NDArray[np.int64]
    formats: tuple[Format, ...]
    costs: NDArray[np.float64]
    sizes: NDArray[np.int64]
    weights: NDArray[np.int64]
    budget_bits: int
    overhead_bits: int = 0
    frequency: tuple[NDArray[np.float64], ...] | None = None
    router_weight: tuple[NDArray[np.float64], ...] | None = None
    block_errors: tuple[NDArray[np.float64], ...] | None = None
    gradient_errors: tuple[NDArray[np.float64], ...] | None = None
    significance: tuple[NDArray[np.float64], ...] | None = None
    entropy: NDArray[np.float64] | None = None
    similarity: NDArray[np.float64] | None = None
    outliers: NDArray[np.float64] | None = None
    latency: NDArray[np.float64] | None = None
    latency_budget: float | None = None
    allowed: NDArray[np.bool_] | None = None
    max_classes: int | None = None

    def __post_init__(self) -> None:
        units, expected = len(self.unit_site), (len(self.unit_site), len(self.formats))
        vectors = (self.unit_expert, self.unit_projection, self.weights)
        if units == 0 or not self.formats:
            raise ValueError("an allocation problem needs a unit and a format")
        if self.costs.shape != expected or self.sizes.shape != expected:
            raise ValueError(f"costs {self.costs.shape} and sizes {self.sizes.shape} are not {expected}")
        if any(vector.shape != (units,) for vector in vectors):
            raise ValueError(f"the descriptions of units do not have {units} entries each")
        if not np.isfinite(self.costs).all() or (self.sizes <= 0).any():
            raise ValueError("costs must be finite, sizes positive")
        if self.allowed is not None and not self.allowed.any(axis=1).all():
            raise ValueError("a unit is allowed no format")

    def merged(self, groups: NDArray[np.int64]) -> Problem:
        """The problem whose units are groups of these: `groups` int64 [U], numbered from 0 by first unit.

        Units of a group take one format; costs, sizes, weights and latencies add up, and a group may have the
        formats that all its units may. What describes single units is of the first.
        """
        first = np.unique(groups, return_index=True)[1]
        count = len(first)

        def total(values: NDArray[Any]) -> NDArray[Any]:
            sums = np.zeros((count, *values.shape[1:]), dtype=values.dtype)
            np.add.at(sums, groups, values)
            return sums

        return replace(
            self.part(first, self.available_bits),
            costs=total(self.costs),
            sizes=total(self.sizes),
            weights=total(self.weights),
            budget_bits=self.budget_bits,
            overhead_bits=self.overhead_bits,
            latency=None if self.latency is None else total(self.latency),
            allowed=None if self.allowed is None else total((~self.allowed).astype(np.int64)) == 0,
        )

    @property
    def permitted(self) -> NDArray[np.bool_]:
        """`allowed`, or all true: bool [U, F]."""
        return np.ones(self.sizes.shape, dtype=np.bool_) if self.allowed is None else self.allowed

    def part(self, units: NDArray[np.int64], available_bits: int) -> Problem:
        """The problem of some units (int64 [n], ascending) alone, with `available_bits` for them."""
        return replace(
            self,
            unit_site=self.unit_site[units],
            unit_expert=self.unit_expert[units],
            unit_projection=self.unit_projection[units],
            costs=self.costs[units],
            sizes=self.sizes[units],
            weights=self.weights[units],
            budget_bits=available_bits,
            overhead_bits=0,
            outliers=None if self.outliers is None else self.outliers[units],
            latency=None if self.latency is None else self.latency[units],
            allowed=None if self.allowed is None else self.allowed[units],
        )

    @property
    def available_bits(self) -> int:
        """Stored bits left for units."""
        return self.budget_bits - self.overhead_bits

    def bits_per_weight(self, size: int) -> float:
        """Expert file bits per weight when the units take `size` stored bits."""
        return (size + self.overhead_bits) / int(self.weights.sum())

    def require(self, smallest: int, largest: int, family: str) -> None:
        """BudgetError when the `smallest` plan (stored bits) of a `family` of plans exceeds the budget."""
        if smallest > self.available_bits:
            raise self._out_of_reach(smallest, largest, family)

    def require_spendable(self) -> None:
        """BudgetError when even the largest plan leaves more than a tenth of the budget unspent.

        A family that ends a little below the budget (PMQ's, at 3 bits) gives its largest plan; one that ends
        far below would not be what its bits say.
        """
        smallest, largest = (int(extreme(axis=1).sum()) for extreme in (self.sizes.min, self.sizes.max))
        if largest < SPENT_SHARE * self.available_bits:
            raise self._out_of_reach(smallest, largest, "these formats")

    def _out_of_reach(self, smallest: int, largest: int, family: str) -> BudgetError:
        # Rounded inward: what the message names can be asked for.
        least = math.ceil(1000 * self.bits_per_weight(smallest)) / 1000
        most = math.floor(1000 * self.bits_per_weight(largest)) / 1000
        way = "raise" if self.available_bits < smallest else "lower"
        return BudgetError(
            f"{self.bits_per_weight(self.available_bits):.4g} bits per weight are out of reach: {family} "
            f"reach {least:.3f} to {most:.3f}; {way} the bits or allow other formats"
        )

    def solution(self, choice: NDArray[np.int64], gap: float | None = None) -> Solution:
        """The outcome of `choice` (int64 [U], index of each unit's format); InternalError over budget."""
        rows = np.arange(len(choice))
        size = int(self.sizes[rows, choice].sum())
        if size > self.available_bits:
            raise InternalError(f"a plan of {size} bits exceeds the {self.available_bits} available")
        return Solution(choice, float(self.costs[rows, choice].sum()), size, gap)


@dataclass(frozen=True, eq=False)
class Solution:
    """A plan: `choice` int64 [U], its `cost` and `size` (stored bits of the units, without overhead).

    `gap`: proven bound on ``(cost - optimum) / |optimum|`` over all plans, None where nothing is proven.
    """

    choice: NDArray[np.int64]
    cost: float
    size: int
    gap: float | None
