"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy.

    `top_k` keeps that many of the most likely tokens (0: all), then `top_p` the fewest of them that have that
    much probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top-k {self.top_k}: must be 0 (all tokens) or more")
        if self.seed is not None and self.seed < 0:
            raise UserError(f"seed {self.seed}: must not be negative")


class Sampler:
    """Draws tokens; equal seeds draw equal sequences."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """One token id from `logits` [V]. Ties of the greedy choice go to the lowest id, as in torch."""
        if self.sampling.temperature == 0.0:
            return int(np.argmax(logits))
        probabilities = distribution(logits, self.sampling)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(min(drawn, np.flatnonzero(probabilities)[-1]))


def distribution(logits: NDArray[np.float32], sampling: Sampling) -> NDArray[np.float64]:
    """Probabilities [V], float64, that `Sampler` draws from; tokens that are not kept have 0.

    Temperature, then top-k, then top-p, as in transformers; of equal tokens the first are kept.
    """
    shifted = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    probabilities = np.exp(shifted)
    order = np.argsort(-probabilities, kind="stable")
    if sampling.top_k:
        probabilities[order[sampling.top_k :]] = 0.0
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities
