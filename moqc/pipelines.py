"""The passes of a compilation, and the options that decide which they are."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from tvm import IRModule

from moqc.errors import BudgetError, UserError
from moqc.log import event
from moqc.options import Debug
from moqc.passes.allocate_bits import MOST_BITS, AllocateBits
from moqc.passes.allocation_problem import OWN_FORMATS
from moqc.passes.base import PassContext
from moqc.passes.measure_costs import FORMATS
from moqc.passes.pipeline import Pipeline
from moqc.quant.allocators.table import find_allocator
from moqc.quant.formats import Format
from moqc.quant.overrides import Override
from moqc.quant.quantizers import STORABLE
from moqc.recipe import PRIOR, Recipe

DEFAULT_QUANTIZER = "gptq"
TRELLIS_FORMATS = ("tcq1-g128", "tcq2-g128", "tcq3-g128", "int4-g128-s8")
ASYMMETRIC_FORMATS = ("int1-g128", "int2-g128", "int2-g64", "int3-g128", "int4-g128")
CANDIDATES = {"integer": FORMATS, "asymmetric": ASYMMETRIC_FORMATS, "trellis": TRELLIS_FORMATS}
"""Families of formats to choose from. Trellises lose less at equal size, take about three times as long to
quantize and longer to multiply with; docs/methods.md has the measurements."""
DEFAULT_CANDIDATES = "integer"
TRELLIS_QUANTIZERS = ("gptq", "rtn")
"""Quantizers that can round to them."""
WIDE = "int8-g128"
WIDEST_BITS = 4.0
"""Budget up to which 8-bit candidates are not worth their measurement."""
MCMOE_EXTRA_BITS = (32 - 24) / 128
"""Bits a weight by which MC-MoE's storage (float16 scale and zero) exceeds that of its plans' formats."""
COSTS_BY = "rtn"
"""Quantizer whose errors are the costs, whatever rounds in the end; docs/quality.md has what others give."""
ANALYSES = {
    "uniform": (),
    "frequency": ("profile-activation",),
    "block-importance": ("measure-similarity",),
    "outlier-score": ("profile-weights",),
    "ewq": ("profile-weights",),
    "moqa": ("profile-activation",),
    "pmq": ("profile-activation", "measure-block-errors"),
    "gemq": ("measure-gradients",),
    "mxmoe": (
        "profile-channels",
        f"measure-costs{{{{quantizer={{quantizer}} formats={'+'.join(OWN_FORMATS['mxmoe'])}{{rotate}}}}}}",
    ),
    "global": (
        "profile-activation",
        "profile-channels",
        "measure-gradients",
        "measure-costs{{quantizer={by} formats={formats} curvature=expert prior={prior}{rotate}}}",
    ),
}
"""What an allocator reads is measured by these passes; any other allocator gets all of them."""
REPORTED = "profile-coactivation{probe=none}"
"""Measured for the report alone, in a forward pass over few tokens."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Which allocator decides on bits, which quantizer rounds, and to what: ``allocator:quantizer:formats``.

    `formats`: candidates, as for `candidate_formats`; None where that is said elsewhere.
    """

    allocator: str
    quantizer: str = DEFAULT_QUANTIZER
    formats: str | None = None

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Read ``global``, ``uniform:rtn`` or ``global:gptq:trellis``; a ``+`` stands between formats.

        Raises UserError for an unknown allocator or quantizer.
        """
        from moqc.calibrate.quantize import QUANTIZERS

        allocator, _, rest = text.partition(":")
        quantizer, _, formats = rest.partition(":")
        plan = cls(allocator, quantizer or DEFAULT_QUANTIZER, formats.replace("+", ",") or None)
        find_allocator(plan.allocator)
        if plan.quantizer not in QUANTIZERS:
            raise UserError(f"unknown quantizer {plan.quantizer!r}: known are {', '.join(QUANTIZERS)}")
        return plan

    @property
    def needs_calibration(self) -> bool:
        """Whether calibration text is read."""
        data_free = self.quantizer in STORABLE and STORABLE[self.quantizer].data_free
        return not data_free or self.allocator != "uniform"

    @property
    def rotates(self) -> bool:
        """Whether the inputs of down are rotated, given kernels that can."""
        return self.quantizer in STORABLE and STORABLE[self.quantizer].rotates


@dataclass(frozen=True, slots=True)
class Pruning:
    """What `prune-routing` is told; its docstring says what the fields mean."""

    share: float = 0.0
    loss: float = 0.0
    rule: str = "mass"
    cold: str = "keep"

    @classmethod
    def of(cls, recipe: Recipe) -> Pruning | None:
        """The pruning asked for, None for none. Raises UserError for options that do not go together."""
        share, loss = recipe.prune, recipe.prune_loss
        if share is None and loss is None:
            if recipe.cold_expert_policy != "keep":
                raise UserError("cold experts are found by pruning: give --prune or --prune-loss too")
            return None
        if share is not None and loss is not None:
            raise UserError("prune by a share of the work or by a loss, not by both")
        amount = loss if share is None else share
        if amount is None or not 0 < amount < 1:
            raise UserError(f"prune {amount:g}: must be above 0 and below 1")
        return cls(share or 0.0, loss or 0.0, recipe.prune_rule, recipe.cold_expert_policy)

    def __str__(self) -> str:
        return f"prune-routing{{rule={self.rule} share={self.share!r} loss={self.loss!r} cold={self.cold}}}"


def check_bits(bits: float) -> None:
    """Raise BudgetError for a number that no model's file bits per expert weight can be."""
    if not 0 < bits <= MOST_BITS:
        raise BudgetError(f"bits {bits:g}: must be above 0 and at most {MOST_BITS:g}")


def candidate_formats(
    bits: float, quantizer: str = DEFAULT_QUANTIZER, chosen: str = DEFAULT_CANDIDATES
) -> tuple[str, ...]:
    """Formats that an allocation for a budget of `bits` chooses from: those `chosen`.

    `chosen` is a name of `CANDIDATES`, or formats separated by commas. Raises UserError for an unknown one,
    and for trellises where `quantizer` cannot round to them.
    """
    if chosen == DEFAULT_CANDIDATES and quantizer == "hqq":
        chosen = "asymmetric"  # zero points are what it chooses
    formats = CANDIDATES.get(chosen) or tuple(str(Format.parse(name.strip())) for name in chosen.split(","))
    trellis = any(Format.parse(name).trellis for name in formats)
    if trellis and quantizer not in TRELLIS_QUANTIZERS:
        raise UserError(
            f"formats {chosen!r}: trellises need one of the quantizers {', '.join(TRELLIS_QUANTIZERS)}; "
            "use integer formats"
        )
    return formats if bits <= WIDEST_BITS or chosen not in CANDIDATES else (*formats, WIDE)


def allocation_pipeline(
    plan: Plan,
    bits: float,
    *,
    model_bits: float | None = None,
    formats: str = DEFAULT_CANDIDATES,
    prior: float = PRIOR,
    rotate: bool = True,
    overrides: Sequence[Override] = (),
) -> Pipeline:
    """The passes that end with moqc.bits: measure what the allocator reads, then allocate.

    With `model_bits`, the budget is file bits a weight of the whole model, and `bits` does nothing. `formats`
    are the candidates of a plan that does not name its own, as for `candidate_formats`, and 8 bits where
    `overrides` ask for them; `prior`: that of `MeasureCosts`; `rotate`: the kernels can rotate the inputs of
    down.
    """
    # What is measured with a simulated quantizer is measured with the one whose formats are real.
    quantizer = plan.quantizer if plan.quantizer in STORABLE else DEFAULT_QUANTIZER
    analyses = ANALYSES.get(plan.allocator, (*ANALYSES["pmq"], *ANALYSES["global"]))
    budget = bits if model_bits is None else model_bits
    candidates = candidate_formats(budget, plan.quantizer, plan.formats or formats)
    if WIDE not in candidates and any(8 in override.bits for override in overrides):
        candidates = (*candidates, WIDE)
    names = "+".join(candidates)
    rotated = _rotation(plan, rotate)
    values = {"quantizer": quantizer, "formats": names, "rotate": rotated, "prior": prior, "by": COSTS_BY}
    texts = [text.format(**values) for text in analyses]
    if plan.quantizer == "mcmoe":
        bits -= MCMOE_EXTRA_BITS
    texts += [] if model_bits is None else ["measure-linears"]
    allocation = AllocateBits(
        bits=AllocateBits.bits if model_bits is not None else bits,
        model_bits=model_bits or 0.0,
        allocator=plan.allocator,
        overrides=tuple(map(str, overrides)),
    )
    return Pipeline((*Pipeline.parse(",".join(texts)).passes, allocation))


def _rotation(plan: Plan, rotate: bool) -> str:
    return " rotate=true" if rotate and plan.rotates else ""


def default_pipeline(
    recipe: Recipe,
    *,
    activations: str,
    context: int,
    kv_cache: str = "float32",
    rotate: bool = True,
    narrow: bool = False,
) -> Pipeline:
    """All passes of `moqc compile`, from the imported module to one that can be built.

    `activations` is "int8" or "float" and `context` a number of tokens: what the recipe's are on the target
    and model at hand, `kv_cache` the dtype of caches. `rotate`: the target's kernels can rotate the inputs of
    down; `narrow`: its integers have 32 bits. Raises UserError for a choice that cannot be.
    """
    plan = Plan.parse(f"{recipe.allocator}:{recipe.quantizer}")
    if plan.quantizer == "mcmoe":
        raise UserError("quantizer mcmoe is simulated, for `moqc compare` only; compile with gptq or rtn")
    pruning = Pruning.of(recipe)
    check_bits(recipe.bits if recipe.model_bits is None else recipe.model_bits)
    linears = check_lowering(recipe.linears, activations, recipe.max_batch)
    rotated = _rotation(plan, rotate)
    quantizing = Pipeline.parse(
        ("" if pruning is None else f"{pruning},")
        + f"quantize-experts{{quantizer={plan.quantizer} activations={activations}{rotated}}},"
        f"quantize-linears{{linears={linears} embeddings={linears} activations={activations}}}"
    )
    rest = lowering_pipeline(context, recipe.max_batch, kv_cache, narrow=narrow)
    allocation = allocation_pipeline(
        plan,
        recipe.bits,
        model_bits=recipe.model_bits,
        formats=recipe.formats,
        prior=recipe.prior,
        rotate=rotate,
        overrides=recipe.overrides,
    )
    reported = Pipeline.parse(REPORTED).passes if plan.needs_calibration else ()
    return Pipeline((*reported, *allocation.passes, *quantizing.passes, *rest.passes))


def needs_calibration(recipe: Recipe) -> bool:
    """Whether the passes of `recipe` read calibration text, as those of a pipeline of its own may."""
    plan = Plan.parse(f"{recipe.allocator}:{recipe.quantizer}")
    return recipe.pipeline is not None or Pruning.of(recipe) is not None or plan.needs_calibration


def check_lowering(linears: str, activations: str, max_batch: int) -> str:
    """`linears` in its usual spelling. Raises UserError for one of the values that no pass takes."""
    if activations not in ("int8", "float"):
        raise UserError(f"unknown activations {activations!r}: known are int8, float")
    if max_batch < 1:
        raise UserError(f"max-batch {max_batch}: must be at least 1")
    return linears if linears == "none" else str(Format.parse(linears))


def lowering_pipeline(context: int, max_batch: int, kv_cache: str, *, narrow: bool = False) -> Pipeline:
    """The passes after quantization: caches, kernels, schedules; `narrow` for devices of 32-bit integers."""
    # What has no 64-bit integers runs a list of launches, those of main.
    between = "narrow-integers" if narrow else "last-logits"
    cache = f"plan-cache{{context={context} batch={max_batch} dtype={kv_cache}}}"
    return Pipeline.parse(f"{cache},{between},legalize,schedule")


def run_passes(pipeline: Pipeline, mod: IRModule, ctx: PassContext, debug: Debug) -> IRModule:
    """Run `pipeline`, saying which pass is at work, and showing what `debug` asks for on stderr."""
    return pipeline.run(
        mod,
        ctx,
        verify_each=debug.verify_each,
        dump_dir=debug.dump_ir,
        print_after=tuple(debug.print_after),
        time_passes=debug.time_passes,
        stop_after=debug.stop_after,
        progress=lambda number, count, text: event(
            "pass", f"[{number}/{count}] {text}", number=number, count=count, text=text
        ),
        report=lambda text: print(text, file=sys.stderr),
    )
