"""Who got bits, in sentences."""

from __future__ import annotations

from typing import Any

import numpy as np

from moqc.report.data import Report


def cheap_format(report: Report) -> str | None:
    """The measured format nearest to 2.2 bits: cheap enough that differences between experts show."""
    names = report.measured_formats
    return min(names, key=lambda name: abs(report.uniform_bits(name) - 2.2), default=None)


def why(report: Report) -> list[str]:
    """Sentences on who got bits: extremes by layer, and what bits go along with."""
    if not report.blocks:
        return []
    means = [float(block.mean_bits.mean()) for block in report.blocks]
    most, least = int(np.argmax(means)), int(np.argmin(means))
    sentences = [
        f"Layer {report.blocks[most].label} got the most bits ({means[most]:.2f} on average), layer "
        f"{report.blocks[least].label} the fewest ({means[least]:.2f})."
    ]
    by_projection = {
        name: float(np.mean([block.bits[name].mean() for block in report.blocks]))
        for name in report.projections
    }
    ordered = sorted(by_projection, key=lambda name: -by_projection[name])
    listed = ", ".join(f"{name} {by_projection[name]:.2f}" for name in ordered)
    sentences.append(f"By projection: {listed} bits.")
    sentences += _correlations(report)
    overrides = () if report.recipe is None else report.recipe.overrides
    if overrides:
        listed = ", ".join(map(str, overrides))
        sentences.append(f"The recipe holds the projections that these name to some bits: {listed}.")
    return sentences


def _correlations(report: Report) -> list[str]:
    """A sentence on what an expert's bits go along with, as far as it was measured."""
    bits, found = np.concatenate([block.mean_bits for block in report.blocks]), []
    cheap = cheap_format(report) or ""
    for label, values in (
        ("its measured harm in a cheap format", [block.harm(cheap) for block in report.blocks]),
        ("its share of the tokens", [block.share for block in report.blocks]),
    ):
        known = [value for value in values if value is not None]
        if len(known) == len(values) and bits.std() > 0:
            found.append(f"{_rank_correlation(bits, np.concatenate(known)):+.2f} with {label}")
    if not found:
        return []
    return [f"Rank correlation of an expert's bits: {', '.join(found)} (1: the same order, 0: none)."]


def _rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, ties by average ranks."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic)
