"""What a layer launches for more than 8 tokens, by their number; no TVM here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moqc.schedules.cuda.plan import COLUMN_TOKENS
from moqc.schedules.cuda.quads import FEW, MOST_TOKENS, QuadsPlan
from moqc.schedules.cuda.templates import AnyPlan

UPPER: dict[int, int | None] = {16: 32, 64: 181, 512: 1448, 4096: None}
"""Numbers of tokens that plans are searched at, and up to how many tokens they are used."""


@dataclass(frozen=True)
class Rung:
    """Up to `upper` tokens (None: any number) these two kernels; without them the grouped product."""

    upper: int | None
    gate_up: AnyPlan | None = None
    down: AnyPlan | None = None


def ladder(plans: Mapping[str, AnyPlan], grouped: int | None, share: float = 0.0) -> list[Rung]:
    """The rungs above 8 tokens, the last one without a limit; an expert has `share` of all tokens.

    Where `plans` has a pair for a number of tokens, it is used; elsewhere the kernels for 8 tokens, or from
    `grouped` tokens on (None: never) the grouped product. The int8 kernels are for few tokens an expert;
    beyond, slots.
    """
    few, rungs, lower = (plans[f"gate_up_{COLUMN_TOKENS}"], plans[f"down_{COLUMN_TOKENS}"]), [], COLUMN_TOKENS
    quads = isinstance(few[0], QuadsPlan)
    slots = (plans["gate_up_many"] if quads else few[0], plans["down_many"])

    def below(upper: int | None) -> Rung:
        small = upper is not None and upper <= MOST_TOKENS and upper * share <= FEW
        return Rung(upper, *(few if quads and small else slots))

    for tokens, upper in UPPER.items():
        gate_up, down = plans.get(f"gate_up_{tokens}"), plans.get(f"down_{tokens}")
        if gate_up is not None and down is not None:
            rungs.append(Rung(upper, gate_up, down))
        elif grouped is None or (upper is not None and upper < grouped):
            rungs.append(below(upper))
        else:
            if grouped > lower + 1:
                rungs.append(below(grouped - 1))
            rungs.append(Rung(upper))
        lower = upper or lower
    kernels = [(rung.gate_up, rung.down) for rung in rungs]
    return [
        rung for rung, own, above in zip(rungs, kernels, [*kernels[1:], None], strict=True) if own != above
    ]
