"""From the annotations of a module to a bit-allocation problem.

What is read, E experts a site, lists by expert:

* COSTS: ``{site: {projection: {format name: [int] * E}}}``. Harm of storing that unit in the format, additive
  over units; scaled so that the largest is 1e12, and only ratios matter.
* PROFILE: ``{site: {"tokens": int, "pairs": [int] * E, "weight_ppm": [int] * E, "significance_ppm": {dataset:
  [int] * E}, ...}}``, see `profile_activation`.
* BLOCK_ERRORS: ``{site: {"1": [int] * E, "2": ..., "3": ...}}``: change of the block's output with one expert
  quantized to that many bits; only ratios within a site matter. GRADIENTS has the same under "sites", where
  ratios between sites matter too.
* WEIGHTS: ``{site: {"entropy": int, "outliers": {projection: [int] * E}}}``; SIMILARITY: ``{site: int}``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tvm import IRModule

from moqc.errors import PipelineError
from moqc.ir.annotations import BLOCK_ERRORS, COSTS, GRADIENTS, PROFILE, SCORES, SIMILARITY, WEIGHTS, Key
from moqc.ir.sites import ExpertSite
from moqc.quant.formats import Format
from moqc.quant.problem import MCMOE_BITS, PROJECTIONS, Problem

FORMATS = ("int1-g64", "int2-g128", "int2-g64", "int3-g128", "int3-g64", "int4-g64", "int8-g64")
"""Candidates of allocators that need no costs, when neither `formats` nor COSTS name any."""
_MCMOE_FORMATS = tuple(f"int{bits}-g128" for bits in MCMOE_BITS)
OWN_FORMATS: dict[str, tuple[str, ...]] = {
    "moqa": tuple(f"int{bits}-g128" for bits in (1, 2, 3, 4, 6, 8)),
    "pmq": _MCMOE_FORMATS,
    "gemq": _MCMOE_FORMATS,
    "mxmoe": (*_MCMOE_FORMATS, "int4-g128"),
}
"""Candidates of the allocators whose publications fix them."""
NEEDS: dict[str, tuple[Key[Any], ...]] = {
    "uniform": (),
    "frequency": (PROFILE,),
    "block-importance": (SIMILARITY,),
    "outlier-score": (WEIGHTS,),
    "ewq": (WEIGHTS,),
    "moqa": (PROFILE,),
    "pmq": (PROFILE, BLOCK_ERRORS),
    "gemq": (GRADIENTS,),
    "mxmoe": (COSTS,),
    "global": (COSTS,),
}
"""Annotations an allocator cannot do without. Without `OWN_FORMATS` it uses COSTS too if they are there."""
SUPER_BITS = 4
"""Least code width of super experts (`score_experts`), with the global allocator."""
TABLE_BITS = 3 * 2 * 32
"""Stored bits of an expert's entries in the table int32 [3, E, 2] of R.moqc.mixed_experts."""

Unit = tuple[int, int, str]
"""Number of the site, expert, projection."""


def build_problem(
    mod: IRModule, sites: Sequence[ExpertSite], allocator: str, names: Sequence[str], bits: float
) -> Problem:
    """The problem of `allocator` for `bits` stored bits a weight; `names`: the formats asked for, if any."""
    with_costs = COSTS in NEEDS[allocator] or allocator not in OWN_FORMATS
    costs = COSTS.get(mod) if with_costs else None
    formats = tuple(Format.parse(name) for name in _format_names(allocator, costs, sites, names))
    units = [
        (number, expert, projection)
        for number, site in enumerate(sites)
        for expert in range(site.experts)
        for projection in site.projections
    ]
    shapes = [sites[number].shape(projection) for number, _, projection in units]
    # Of the model; what protected channels add to the shapes is size only.
    weights = np.array(
        [sites[number].hidden * sites[number].intermediate for number, _, _ in units], np.int64
    )
    return Problem(
        sites=tuple(site.site for site in sites),
        unit_site=np.array([number for number, _, _ in units], dtype=np.int64),
        unit_expert=np.array([expert for _, expert, _ in units], dtype=np.int64),
        unit_projection=np.array([PROJECTIONS.index(name) for _, _, name in units], dtype=np.int64),
        formats=formats,
        costs=_costs(costs, sites, units, formats),
        sizes=np.array([[f.stored_bits(*shape) for f in formats] for shape in shapes], dtype=np.int64),
        weights=weights,
        budget_bits=math.floor(bits * int(weights.sum())),
        overhead_bits=sum(site.experts * TABLE_BITS for site in sites),
        allowed=_allowed(SCORES.get(mod), sites, units, formats),
        **_scores(mod, [site.site for site in sites], units),
    )


def _format_names(
    allocator: str, costs: dict[str, Any] | None, sites: Sequence[ExpertSite], names: Sequence[str]
) -> Sequence[str]:
    """Names of the candidates. PipelineError when the costs of one were not measured."""
    names = names or OWN_FORMATS.get(allocator, ())
    if costs is None:
        return names or FORMATS
    measured = set.intersection(*(set(costs[s.site][p]) for s in sites for p in s.projections))
    missing = sorted(set(names) - measured)
    if missing:
        raise PipelineError(
            f"allocate-bits: no costs for {', '.join(missing)}; measured are {', '.join(sorted(measured))}"
        )
    return names or sorted(measured)


def _scores(mod: IRModule, sites: Sequence[str], units: Sequence[Unit]) -> dict[str, Any]:
    """The optional fields of `Problem`, of the annotations that are there."""
    profile, errors, gradients = PROFILE.get(mod), BLOCK_ERRORS.get(mod), GRADIENTS.get(mod)
    weights, similarity = WEIGHTS.get(mod), SIMILARITY.get(mod)
    found: dict[str, Any] = {}
    if profile is not None:
        found["frequency"] = tuple(_frequency(profile[site]) for site in sites)
        found["router_weight"] = tuple(_router_weight(profile[site]) for site in sites)
        found["significance"] = tuple(_significance(profile[site]) for site in sites)
    if errors is not None:
        found["block_errors"] = tuple(_by_bits(errors[site]) for site in sites)
    if gradients is not None:
        found["gradient_errors"] = tuple(_by_bits(gradients["sites"][site]) for site in sites)
    if weights is not None:
        found["entropy"] = np.array([weights[site]["entropy"] for site in sites], dtype=np.float64)
        scores = [weights[sites[site]]["outliers"][name][expert] for site, expert, name in units]
        found["outliers"] = np.array(scores, dtype=np.float64)
    if similarity is not None:
        found["similarity"] = np.array([similarity[site] for site in sites], dtype=np.float64)
    return found


def _costs(
    costs: dict[str, Any] | None,
    sites: Sequence[ExpertSite],
    units: Sequence[Unit],
    formats: Sequence[Format],
) -> NDArray[np.float64]:
    if costs is None:
        return np.zeros((len(units), len(formats)))
    names = [str(fmt) for fmt in formats]
    rows = [[costs[sites[site].site][name][fmt][expert] for fmt in names] for site, expert, name in units]
    return np.array(rows, dtype=np.float64)


def _allowed(
    scores: dict[str, Any] | None,
    sites: Sequence[ExpertSite],
    units: Sequence[Unit],
    formats: Sequence[Format],
) -> NDArray[np.bool_] | None:
    """Units of super experts may have the formats of at least `SUPER_BITS`; None where there are none."""
    pinned = [scores is not None and expert in scores[sites[site].site]["super"] for site, expert, _ in units]
    wide = np.array([fmt.bits >= SUPER_BITS for fmt in formats])
    if not any(pinned) or not wide.any():
        return None
    return np.where(np.array(pinned)[:, None], wide[None], True)


def _frequency(profile: dict[str, Any]) -> NDArray[np.float64]:
    pairs = np.array(profile["pairs"], dtype=np.float64)
    share: NDArray[np.float64] = pairs / max(pairs.sum(), 1)
    return share


def _router_weight(profile: dict[str, Any]) -> NDArray[np.float64]:
    mass = np.array(profile["pairs"], dtype=np.float64) * np.array(profile["weight_ppm"], dtype=np.float64)
    per_token: NDArray[np.float64] = mass / 1e6 / max(profile["tokens"], 1)
    return per_token


def _significance(profile: dict[str, Any]) -> NDArray[np.float64]:
    table = np.array(list(profile["significance_ppm"].values()), dtype=np.float64)
    mean: NDArray[np.float64] = table.mean(axis=0) / 1e6
    return mean


def _by_bits(errors: dict[str, list[int]]) -> NDArray[np.float64]:
    return np.array([errors[str(bits)] for bits in MCMOE_BITS], dtype=np.float64).T
