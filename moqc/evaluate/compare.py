"""Plans side by side: what the model says with its experts quantized as each plan has it.

Nothing is compiled: the quantized weights are evaluated by the reference forward, which is what compiled
kernels are tested against. Everything slow is cached in the workspace, the results too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tvm import IRModule

from moqc.calibrate.quantize import quantize_experts
from moqc.errors import BudgetError
from moqc.evaluate.bench import Bench, Linears
from moqc.evaluate.probes import TextProbe
from moqc.ir.annotations import BITS, LINEAR_PLAN
from moqc.log import logger
from moqc.options import Debug
from moqc.passes.base import PassContext
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
    text. `flips`: share of the questions it answers otherwise than the unquantized model. `exact`: share of
    the worked problems whose result it gives exactly. None: not asked.
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


def compare_plans(
    contexts: Mapping[int, PassContext],
    bench: Bench,
    plans: Sequence[tuple[str, Plan]],
    budgets: Sequence[Budget],
    *,
    linears: str = "none",
    formats: str = DEFAULT_CANDIDATES,
) -> Comparison:
    """Evaluate each of `plans` (its text and itself) at each of `budgets`.

    `contexts`: seed -> a context whose calibration text was drawn with it. `bench` has a `TextProbe` called
    "text", and may have another one called "unseen", a `ChoiceProbe` "choices" and an `ExactProbe` "exact".
    `formats`: candidates of the allocators, as for `candidate_formats`; quantizers that cannot round to
    trellises choose from the default ones.
    `linears`: format of the other matrices, or "none": as stored. A pair of plan and budget that is out of
    reach is left out with a warning; BudgetError when none is left.
    """
    for budget in budgets:
        check_bits(budget.bits)
    others = QuantizeLinears(linears=linears, embeddings=linears).plan(bench.mod)
    planned: list[tuple[str, Plan, Budget, int, IRModule]] = []
    unreachable: list[str] = []
    for seed, ctx in contexts.items():
        for budget in budgets:
            for text, plan in plans:
                logger.info("planning %s at %s, seed %d", text, budget, seed)
                whole = budget.bits if budget.whole else None
                try:
                    wanted = formats if plan.quantizer in TRELLIS_QUANTIZERS else DEFAULT_CANDIDATES
                    passes = allocation_pipeline(plan, budget.bits, model_bits=whole, formats=wanted)
                    mod = run_passes(passes, bench.mod, ctx, Debug())
                except BudgetError as error:
                    unreachable.append(f"{text} at {budget}: {error}")
                else:
                    planned.append((text, plan, budget, seed, mod))
    if not planned:
        raise BudgetError("; ".join(unreachable))
    for reason in dict.fromkeys(unreachable):
        logger.warning("left out: %s", reason)
    reference = bench.measure(None, {})
    rows = []
    for text, plan, budget, seed, mod in planned:
        logger.info("evaluating %s at %s, seed %d", text, budget, seed)
        chosen = LINEAR_PLAN.get(mod) if budget.whole else None
        mine = others if chosen is None else {site: Format.parse(name) for site, name in chosen.items()}
        rows.append(_row(bench, contexts[seed], reference, (text, plan, budget, seed), mod, mine))
    return _comparison(bench, reference, rows)


def _row(
    bench: Bench,
    ctx: PassContext,
    reference: Mapping[str, Any],
    what: tuple[str, Plan, Budget, int],
    mod: IRModule,
    linears: Linears,
) -> Row:
    """Quantize and evaluate one plan."""
    text, plan, budget, seed = what
    chosen = BITS.of(mod)
    store = quantize_experts(
        bench.checkpoint,
        chosen,
        plan.quantizer,
        ctx.calibration,
        bench.workspace,
        rotate=plan.rotates,
    )
    found = bench.measure(store, linears)
    expert_bits = bench.expert_bits(store)
    names = {name for site in chosen.values() for formats in site.values() for name in formats}
    return Row(
        plan=text,
        allocator=plan.allocator,
        quantizer=plan.quantizer,
        target_bits=budget.bits,
        whole=budget.whole,
        seed=seed,
        simulated=plan.quantizer == "mcmoe" or any(Format.parse(name).simulated for name in names),
        expert_file_bits_per_weight=expert_bits / bench.counts.expert_weights,
        model_file_bits_per_weight=(expert_bits + bench.other_bits(linears)) / bench.counts.model_weights,
        loss=found["text"]["loss"],
        loss_increase=found["text"]["loss"] - reference["text"]["loss"],
        unseen_increase=(
            found["unseen"]["loss"] - reference["unseen"]["loss"] if "unseen" in found else None
        ),
        flips=_differing(found["choices"], reference["choices"]) if "choices" in found else None,
        exact=_share(found["exact"]) if "exact" in found else None,
    )


def _comparison(bench: Bench, reference: Mapping[str, Any], rows: Sequence[Row]) -> Comparison:
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
        rows=tuple(rows),
    )


def _differing(answers: Sequence[int], reference: Sequence[int]) -> float:
    return sum(one != other for one, other in zip(answers, reference, strict=True)) / len(reference)


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)
