"""How the packed products are cut into tasks and how far ahead they ask for weights; no TVM here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

from moqc.errors import InternalError
from moqc.quant.formats import Format
from moqc.schedules.plan_records import find, record_key
from moqc.targets import Target

P = TypeVar("P", bound="Plan")


@dataclass(frozen=True)
class Plan:
    """Positive numbers by name, written as the first letters of the names with their numbers: ``t64a64``."""

    def __str__(self) -> str:
        return "".join(f"{each.name[0]}{getattr(self, each.name)}" for each in fields(self))

    @classmethod
    def parse(cls: type[P], text: str) -> P:
        """Read what `str` wrote. Raises InternalError."""
        names = [each.name for each in fields(cls)]
        match = re.fullmatch("".join(rf"{name[0]}([1-9]\d*)" for name in names), text)
        if match is None:
            raise InternalError(f"no {cls.__name__}: {text!r}")
        return cls(**dict(zip(names, map(int, match.groups()), strict=True)))


@dataclass(frozen=True)
class RowsPlan(Plan):
    """Few tokens: about `tasks` tasks a thread, `unroll` times 128 columns a turn
    of the loop, whose codes are asked for `ahead` lines of 64 bytes before.

    That is a page, because hardware stops asking at its end: cold decoding took 66 % of the machine's read
    bandwidth without (54 % at 2 bits), 80 % (75 %) with (`moqc bench-kernels --shape olmoe-1b-7b`). They are
    asked into the second-level cache: 81 % in place of 78 % at 4 bits (docs/benchmarks-cpu.md).
    """  # noqa: D205

    tasks: int = 4
    ahead: int = 64
    unroll: int = 1


@dataclass(frozen=True)
class SeveralPlan(Plan):
    """Some tokens an expert: codes are unpacked in registers for `rows` of them at a time, a power of 2, then
    for half as many, down to one; from `least` tokens on a panel is unpacked for all.
    """  # noqa: D205

    rows: int = 2
    least: int = 6


@dataclass(frozen=True)
class PanelPlan(Plan):
    """Many tokens: about `tasks` tasks a thread; with AMX, `batch` times 64 columns are unpacked and
    multiplied with up to `many` tiles of 16 tokens, and codes are asked for `ahead` lines before.
    """  # noqa: D205

    tasks: int = 8
    batch: int = 4
    many: int = 8
    ahead: int = 64


KERNELS = ("gate_up", "down")
TUNED = {"few": 1, "several": 32, "many": 512}
"""Part of `Plans` -> the number of tokens that it is searched for."""


@dataclass(frozen=True)
class Plans:
    """The plans of one kernel, which serves any number of tokens; `recorded`: part -> where it was found."""

    few: RowsPlan = RowsPlan()
    several: SeveralPlan = SeveralPlan()
    many: PanelPlan = PanelPlan()
    recorded: Mapping[str, str] = field(default_factory=dict)

    def with_part(self, part: str, plan: Plan) -> Plans:
        """These plans but for one part."""
        changed: dict[str, Any] = {part: plan}
        return replace(self, **changed)

    @property
    def facts(self) -> dict[str, dict[str, str]]:
        """What the attribute ``moqc.kernel`` says of them."""
        return {"plans": {part: str(getattr(self, part)) for part in TUNED}, "recorded": dict(self.recorded)}


def default_plans(lanes: int, formats: Sequence[Format] = ()) -> Plans:
    """The plans of kernels without records, for vectors of so many float32 lanes and these bit classes.

    Four rows are 1.0 to 1.5 times as fast as two at 32 tokens and compiled 1.6 times as long, with 8 lanes
    twice. Code is made for each class: of several, `moqc tune` may choose four rows.
    """
    four = lanes == 16 and len(set(formats)) <= 1
    return Plans(several=SeveralPlan(4, 8)) if four else Plans()


def find_plans(target: Target, kernel: str, sizes: Sequence[int], formats: Sequence[Format]) -> Plans:
    """The plans of a kernel, recorded or by default; `sizes` are experts, top_k, hidden and intermediate."""
    plans = default_plans(target.vector_lanes, formats)
    for part, tokens in TUNED.items():
        found = find(target, record_key(kernel, tokens, sizes, formats))
        if found is not None:
            text, source = found
            plans = plans.with_part(part, type(getattr(plans, part)).parse(text))
            plans = replace(plans, recorded={**plans.recorded, part: source})
    return plans
