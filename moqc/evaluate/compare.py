"""Plans side by side: what the model says with its experts quantized as each plan has it.

Nothing is compiled: the quantized weights are evaluated by the reference forward, which is what compiled
kernels are tested against. Everything slow is cached in the workspace, the results too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moqc.calibrate.quantize import quantize_experts
from moqc.calibrate.workspace import atomic
from moqc.errors import BudgetError
from moqc.evaluate.bench import Bench, Linears
from moqc.evaluate.probes import TextProbe
from moqc.ir.annotations import BITS, LINEAR_PLAN
from moqc.log import logger
from moqc.options import Debug
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.pipelines import (
    DEFAULT_CANDIDATES,
    TRELLIS_QUANTIZERS,
    Plan,
    allocation_pipeline,
    check_bits,
    run_passes,
)
from moqc.quant.formats import Format
from moqc.recipe import PRIOR


@dataclass(frozen=True)
class Budget:
    """File bits a weight: of the routed experts, or of the `whole` model."""

    bits: float
    whole: bool = False

    def __str__(self) -> str:
        return f"{self.bits:g} {'model ' if self.whole else ''}bits"


@dataclass(frozen=True)
class Row:
    """One plan at one budget, calibrated with one seed.

    Bits are file bits per weight; `whole`: `target_bits` are of the whole model, not of the experts. Losses
    and their increases are in nats. `simulated`: no kernel computes this. `unseen_increase`: on the unseen
    text; `increases`: on every file, unseen ones too. `flips`: share of the questions it answers otherwise
    than the unquantized model. `exact`: share of the worked problems whose result it gives exactly. None:
    not asked.
    """

    plan: str
    allocator: str
    quantizer: str
    target_bits: float
    whole: bool
    seed: int
    simulated: bool
    expert_file_bits_per_weight: float
    model_file_bits_per_weight: float
    loss: float
    loss_increase: float
    increases: dict[str, float]
    unseen_increase: float | None
    flips: float | None
    exact: float | None


@dataclass(frozen=True)
class Comparison:
    """All rows, and the unquantized model's figures on the same `tokens` predictions of the same files."""

    reference_loss: float
    reference_unseen_loss: float | None
    reference_exact: float | None
    tokens: int
    unseen_tokens: int
    questions: int
    problems: int
    files: tuple[str, ...]
    unseen: tuple[str, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the keys of `rows` are the fields of `Row`."""
        return asdict(self)


def keep(path: Path | str | None) -> Callable[[Comparison], None]:
    """A function that writes a comparison to `path` as JSON, whole or not at all; None: one that does not."""

    def write(found: Comparison) -> None:
        if path is not None:
            with atomic(Path(path)) as temporary:
                temporary.write_text(json.dumps(found.to_dict(), indent=1), encoding="utf-8")

    return write


def compare_plans(
    contexts: Mapping[int, PassContext],
    bench: Bench,
    plans: Sequence[tuple[str, Plan]],
    budgets: Sequence[Budget],
    *,
    linears: str = "none",
    formats: str = DEFAULT_CANDIDATES,
    prior: float = PRIOR,
    finished: Callable[[Comparison], None] = lambda _: None,
) -> Comparison:
    """Evaluate each of `plans` (its text and itself) at each of `budgets`.

    `contexts`: seed -> a context whose calibration text was drawn with it. `bench` has a `TextProbe` called
    "text", and may have another one called "unseen", a `ChoiceProbe` "choices" and an `ExactProbe` "exact".
    `formats`: candidates of the allocators, as for `candidate_formats`; quantizers that cannot round to
    trellises choose from the default ones. `prior`: share of costs, as for `MeasureCosts`.
    `linears`: format of the other matrices, or "none": as stored. `finished` is given what there is, before
    the first row and after every one. A pair of plan and budget that is out of reach is left out with a
    warning; BudgetError when none is left.
    """
    for budget in budgets:
        check_bits(budget.bits)
    others = QuantizeLinears(linears=linears, embeddings=linears).plan(bench.mod)
    reference = bench.measure(None, {})
    found = _comparison(bench, reference)
    finished(found)
    unreachable: dict[str, None] = {}
    choose = partial(plan_pipeline, formats=formats, prior=prior)
    for seed, ctx in contexts.items():
        for entry in _entries(plans, budgets, seed):
            try:
                row = _row(bench, ctx, reference, entry, others, choose)
            except BudgetError as error:
                unreachable[f"{entry.text} at {entry.budget}: {error}"] = None
                continue
            logger.info(
                "%s: %+.4f nats in %.3f bits", entry, row.loss_increase, row.expert_file_bits_per_weight
            )
            found = replace(found, rows=(*found.rows, row))
            finished(found)
    if not found.rows:
        raise BudgetError("; ".join(unreachable))
    for reason in unreachable:
        logger.warning("left out: %s", reason)
    return found


def plan_pipeline(
    plan: Plan, budget: Budget, formats: str = DEFAULT_CANDIDATES, prior: float = PRIOR
) -> Pipeline:
    """The passes that choose bits for `plan`, from its own candidates or those of `formats` if it can."""
    wanted = formats if plan.quantizer in TRELLIS_QUANTIZERS else DEFAULT_CANDIDATES
    whole = budget.bits if budget.whole else None
    return allocation_pipeline(plan, budget.bits, model_bits=whole, formats=wanted, prior=prior)


@dataclass(frozen=True)
class _Entry:
    """What a row is to be about; `text` is the plan's."""

    text: str
    plan: Plan
    budget: Budget
    seed: int

    def __str__(self) -> str:
        return f"{self.text} at {self.budget}, seed {self.seed}"


def _entries(plans: Sequence[tuple[str, Plan]], budgets: Sequence[Budget], seed: int) -> Iterator[_Entry]:
    return (_Entry(text, plan, budget, seed) for budget in budgets for text, plan in plans)


def _row(
    bench: Bench,
    ctx: PassContext,
    reference: Mapping[str, Any],
    entry: _Entry,
    linears: Linears,
    choose: Callable[[Plan, Budget], Pipeline],
) -> Row:
    """Plan, quantize and evaluate; `linears` where the plan does not say."""
    logger.info("planning %s", entry)
    plan, budget = entry.plan, entry.budget
    mod = run_passes(choose(plan, budget), bench.mod, ctx, Debug())
    own = LINEAR_PLAN.get(mod) if budget.whole else None
    if own is not None:
        linears = {site: Format.parse(name) for site, name in own.items()}
    logger.info("evaluating %s", entry)
    chosen = BITS.of(mod)
    store = quantize_experts(
        bench.checkpoint,
        chosen,
        plan.quantizer,
        ctx.calibration,
        bench.workspace,
        rotate=plan.rotates,
    )
    expert_bits = bench.expert_bits(store)
    names = {name for site in chosen.values() for units in site.values() for name in units}
    return Row(
        plan=entry.text,
        allocator=plan.allocator,
        quantizer=plan.quantizer,
        target_bits=budget.bits,
        whole=budget.whole,
        seed=entry.seed,
        simulated=plan.quantizer == "mcmoe" or any(Format.parse(name).simulated for name in names),
        expert_file_bits_per_weight=expert_bits / bench.counts.expert_weights,
        model_file_bits_per_weight=(expert_bits + bench.other_bits(linears)) / bench.counts.model_weights,
        **_results(bench.measure(store, linears), reference),
    )


def _results(found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Row` that the probes give."""
    increases = {
        name: loss - reference[probe]["files"][name]
        for probe in ("text", "unseen")
        if probe in found
        for name, loss in found[probe]["files"].items()
    }
    return {
        "loss": found["text"]["loss"],
        "loss_increase": found["text"]["loss"] - reference["text"]["loss"],
        "increases": increases,
        "unseen_increase": (
            found["unseen"]["loss"] - reference["unseen"]["loss"] if "unseen" in found else None
        ),
        "flips": _differing(found["choices"], reference["choices"]) if "choices" in found else None,
        "exact": _share(found["exact"]) if "exact" in found else None,
    }


def _comparison(bench: Bench, reference: Mapping[str, Any]) -> Comparison:
    """What is known before the first row."""
    text, unseen = bench.probes["text"], bench.probes.get("unseen")
    return Comparison(
        reference_loss=reference["text"]["loss"],
        reference_unseen_loss=None if unseen is None else reference["unseen"]["loss"],
        reference_exact=_share(reference["exact"]) if "exact" in reference else None,
        tokens=text.tokens if isinstance(text, TextProbe) else 0,
        unseen_tokens=unseen.tokens if isinstance(unseen, TextProbe) else 0,
        questions=len(reference.get("choices", ())),
        problems=len(reference.get("exact", ())),
        files=tuple(reference["text"]["files"]),
        unseen=tuple(reference["unseen"]["files"]) if "unseen" in reference else (),
        rows=(),
    )


def _differing(answers: Sequence[int], reference: Sequence[int]) -> float:
    return sum(one != other for one, other in zip(answers, reference, strict=True)) / len(reference)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
