"""How `moqc tune` goes through the plans of a kernel: near the best so far, and now and then anywhere."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

ANYWHERE = 3
"""Every so many plans one is drawn from the whole space."""
DRAWS = 50
"""How often a plan is drawn until one is found that was not tried."""

Name = tuple[str, int]
"""A kernel, and the number of tokens that its plan is searched for."""
Plans = Mapping[Name, Any]
"""A plan of each kernel; those of one kind of kernel are compared and written as text."""


@dataclass(frozen=True)
class Space:
    """The plans there are for a kernel: the `default` one, those `near` a plan, and any."""

    default: Any
    near: Callable[[Any], Iterable[Any]]
    draw: Callable[[random.Random], Any]


class Search:
    """The search for one kernel's plan: the best so far, by its time over the default's."""

    def __init__(self, space: Space, seed: int = 0) -> None:
        self._space, self._random = space, random.Random(seed)
        self.best, self.ratio = space.default, 1.0
        self._tried = {space.default}

    def propose(self) -> Any:
        """The next plan to be tried; one that was tried where there are no others."""
        plan = None
        if len(self._tried) % ANYWHERE:
            plan = next((each for each in self._space.near(self.best) if each not in self._tried), None)
        for _ in range(DRAWS):
            if plan is not None and plan not in self._tried:
                break
            plan = self._space.draw(self._random)
        self._tried.add(plan)
        return plan

    def report(self, plan: Any, ratio: float) -> None:
        """Take note of its time over the default's."""
        if ratio < self.ratio:
            self.best, self.ratio = plan, ratio

    @property
    def tried(self) -> int:
        """Number of plans."""
        return len(self._tried)


class TunedLayer(Protocol):
    """A layer whose kernels are compiled with plans and timed beside the default ones, on the target."""

    def spaces(self) -> Mapping[Name, Space]:
        """The plans of each kernel."""

    def compare(self, plans: Plans, effort: float = 1.0) -> Mapping[Name, tuple[float, float]]:
        """Median seconds of each kernel with its plan, and with the default one, in turns."""

    def error(self, plans: Plans) -> tuple[float, float]:
        """The largest relative error of the kernels with these plans, and what is allowed."""
