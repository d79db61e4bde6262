"""Choose the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moqc.errors import UserError


@dataclass(frozen=True, slots=True)
class Sampling:
    """`temperature` 0 is greedy; `top_p` keeps the fewest tokens that have that much probability."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"temperature {self.temperature}: must be 0 (greedy) or a positive number")
        if not 0.0 < self.top_p <= 1.0:
            raise UserError(f"top-p {self.top_p}: must be above 0 and at most 1")
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
        probabilities = distribution(logits, self.sampling.temperature, self.sampling.top_p)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(min(drawn, np.flatnonzero(probabilities)[-1]))


def distribution(logits: NDArray[np.float32], temperature: float, top_p: float) -> NDArray[np.float64]:
    """Probabilities [V], float64, that `Sampler` draws from; tokens outside of the nucleus have 0."""
    shifted = (logits.astype(np.float64) - float(logits.max())) / temperature
    probabilities = np.exp(shifted)
    probabilities /= probabilities.sum()
    if top_p < 1.0:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0.0
        probabilities /= probabilities.sum()
    return probabilities
