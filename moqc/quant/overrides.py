"""Widths that some units are held to, by the names of the units."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moqc.errors import UserError

if TYPE_CHECKING:
    from moqc.quant.problem import Problem


@dataclass(frozen=True)
class Override:
    r"""Units whose name the regular expression `sites` is found in have codes of one of these `bits`.

    A name is that of the block, the expert's number and the projection:
    ``model.layers.0.mlp.experts.5.down``. As text: ``layers\.0\..*down=4,8``.
    """

    sites: str
    bits: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read the text form. Raises UserError."""
        pattern, equals, numbers = text.rpartition("=")
        widths = [item.strip() for item in numbers.split(",")]
        if not (pattern and equals and all(item.isdecimal() for item in widths)):
            example = r"layers\.0\..*down=4,8"
            raise UserError(f"override {text!r}: expected a pattern and bits, such as {example}")
        return cls(pattern, tuple(int(item) for item in widths))

    def __str__(self) -> str:
        return f"{self.sites}={','.join(map(str, self.bits))}"


def restrict(problem: Problem, names: Sequence[str], overrides: Sequence[Override]) -> Problem:
    """`problem` with the units that `overrides` name held to their formats; of several the last decides.

    `names`: of each unit. Raises UserError for a pattern that is none or matches nothing, or bits without a
    candidate.
    """
    if not overrides:
        return problem
    allowed = problem.permitted.copy()
    for override in overrides:
        wide = [fmt.bits in override.bits for fmt in problem.formats]
        if not any(wide):
            widths = ", ".join(map(str, sorted({fmt.bits for fmt in problem.formats})))
            raise UserError(f"override {override}: no candidate has these bits; the formats have {widths}")
        for unit in matches(override, names):
            allowed[unit] = wide
    return replace(problem, allowed=allowed)


def matches(override: Override, names: Sequence[str]) -> list[int]:
    """Numbers of the `names` that the pattern is found in. Raises UserError for none, or a bad pattern."""
    try:
        pattern = re.compile(override.sites)
    except re.error as error:
        raise UserError(f"override {override}: not a regular expression ({error})") from error
    found = [unit for unit, name in enumerate(names) if pattern.search(name)]
    if not found:
        raise UserError(
            f"override {override}: its pattern is found in no name; they go from {names[0]} to {names[-1]}"
        )
    return found
