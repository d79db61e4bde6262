"""Rules of expert pruning side by side: what skipping costs, and what a token still reads.

With a share, all rules skip as much of the experts' work on the calibration text. They are evaluated on the
same windows as plans are (`moqc.evaluate.compare`), by the reference forward, with and without quantized
experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from numpy.typing import NDArray

from moqc.calibrate.quantize import quantize_experts
from moqc.calibrate.skipping import VERSION as SKIPPING_VERSION
from moqc.calibrate.skipping import Skipping
from moqc.calibrate.workspace import digest
from moqc.errors import UserError
from moqc.evaluate.bench import Bench, Linears
from moqc.evaluate.skip_scores import Outcome, SkipBench
from moqc.frontend.trace import Outline
from moqc.ir.annotations import BITS
from moqc.ir.sites import find_linears
from moqc.log import logger
from moqc.options import Debug
from moqc.passes.base import PassContext
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.pipelines import Plan, allocation_pipeline, check_bits, run_passes
from moqc.predict.sizes import FLOAT_BYTES, Storage, footprint
from moqc.predict.speed import Speed, limited, other_speed
from moqc.quant.formats import Format
from moqc.quant.skips import RULES
from moqc.schedules.kernel_times import KernelTimes, kernel_times
from moqc.targets import Target

UNPRUNED = "none"
"""`rule` of a row without pruning, `plan` of one without quantization."""

SPEED = (
    "not measured: bytes of the experts a token keeps and of all other weights, each over what the target's "
    "kernels reach; one sequence, cache empty"
)
"""Where `decode_tokens_per_s` is from, beside the target's own numbers."""


@dataclass(frozen=True)
class SkipRow:
    """One rule on one plan. Losses are in nats.

    `share` of the (token, expert) pairs was to be skipped, `skipped_fraction` was on the text.
    `loss_increase` is over the same weights without pruning, `standard_error` that of this mean over the
    predictions, `kld` the mean KL divergence from the model unquantized and unpruned.
    `active_bytes_per_token`: stored bytes of all weights that decoding a token reads, with the experts that
    it keeps. `decode_tokens_per_s` is predicted (`SPEED`), None where nothing is known of the target.
    """

    plan: str
    target_bits: float | None
    rule: str
    share: float
    skipped_fraction: float
    loss: float
    loss_increase: float
    standard_error: float
    kld: float
    active_bytes_per_token: int
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class SkipComparison:
    """All rows; `shares` is what was asked for, `tokens` the predictions scored in `files`.

    `target` and `speed_source` say what the predicted speed is of.
    """

    shares: tuple[float, ...]
    tokens: int
    files: tuple[str, ...]
    target: str
    speed_source: str
    rows: tuple[SkipRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the keys of `rows` are the fields of `SkipRow`."""
        return asdict(self)


@dataclass(frozen=True)
class SkipChoices:
    """What is compared: `rules`, each at all `shares`, on `plans` (text and plan) at all `bits`.

    `linears` as for `compare_plans`; speeds are predicted for `target`, a token as in `model`.
    """

    plans: Sequence[tuple[str, Plan]]
    bits: Sequence[float]
    shares: Sequence[float]
    rules: Sequence[str]
    linears: str
    target: Target
    model: Outline

    def check(self) -> None:
        """Raise UserError for an unknown rule, or for nothing to compare."""
        unknown = [rule for rule in self.rules if rule not in RULES]
        if unknown or not self.rules:
            named = f"unknown pruning rule {unknown[0]!r}" if unknown else "no pruning rule"
            raise UserError(f"{named}: known are {', '.join(RULES)}")
        if not self.shares:
            raise UserError("no share of the experts' work to skip: give one, such as 20%")
        for bits in self.bits:
            check_bits(bits)


def compare_skips(
    ctx: PassContext, bench: Bench, windows: Mapping[str, NDArray[Any]], choices: SkipChoices
) -> SkipComparison:
    """Evaluate each rule and share on the unquantized model and on each plan at each number of bits.

    `windows`: file name -> int64 [n, window]. Raises BudgetError for a plan out of reach.
    """
    choices.check()
    others = QuantizeLinears(linears=choices.linears, embeddings=choices.linears).plan(bench.mod)
    calibration = ctx.need("calibration", "compare")
    skipping = Skipping.of(bench.checkpoint, calibration, bench.workspace)
    settings = [(rule, share) for share in choices.shares for rule in choices.rules]
    prunings = [skipping.prunings(rule, share) for rule, share in settings]
    key = digest("skips", SKIPPING_VERSION, skipping.key, [list(setting) for setting in settings])
    skips = SkipBench(bench, windows, prunings, key)
    planned = [
        (text, plan, bits, BITS.of(run_passes(allocation_pipeline(plan, bits), bench.mod, ctx, Debug())))
        for bits in choices.bits
        for text, plan in choices.plans
    ]
    reading = _Reading.of_stored(bench, choices)
    tokens = sum(array.size for array in windows.values())
    rows = _rows(UNPRUNED, None, settings, skips.measure(None, {}), reading, tokens)
    for text, plan, bits, formats in planned:
        logger.info("evaluating %s at %g bits", text, bits)
        store = quantize_experts(
            bench.checkpoint, formats, plan.quantizer, calibration, bench.workspace, rotate=plan.rotates
        )
        reading = _Reading.of_plan(bench, choices, formats, others)
        rows += _rows(text, bits, settings, skips.measure(store, others), reading, tokens)
    predictions = tokens - sum(len(array) for array in windows.values())
    source = f"{SPEED}; {_source(kernel_times(choices.target))}"
    return SkipComparison(
        tuple(choices.shares), predictions, tuple(windows), choices.target.name, source, tuple(rows)
    )


def _source(times: KernelTimes) -> str:
    machine = "no roofline is known" if times.machine is None else times.machine.source
    return f"measured matrices: {times.source}; others: {machine}" if times.source else machine


@dataclass(frozen=True)
class _Reading:
    """What decoding a token reads of one set of weights.

    `stored`: site -> stored bytes of each expert; `seconds`: site -> time of each. `other_bytes` are stored,
    `other` is the time of all that is no routed expert; None where nothing is known of the target.
    """

    stored: Mapping[str, Sequence[float]]
    seconds: Mapping[str, Sequence[float]]
    other_bytes: float
    other: Speed | None

    @classmethod
    def of_stored(cls, bench: Bench, choices: SkipChoices) -> _Reading:
        """As the checkpoint has them; in memory floats are float32."""
        machine = choices.target.roofline
        stored, seconds = {}, {}
        for layout in bench.checkpoint.layouts:
            weights, total = 0, 0.0
            for projection in layout.projections:
                _, rows, columns = layout.shape(projection)
                weights += rows * columns
                total += rows * columns * bench.checkpoint.load(layout.source(projection), 0).element_size()
            time = limited(machine, FLOAT_BYTES * weights, weights).seconds if machine else 0.0
            stored[layout.site], seconds[layout.site] = [total] * layout.experts, [time] * layout.experts
        return cls(stored, seconds, _other_bytes(bench, {}), _other_speed(choices, "none"))

    @classmethod
    def of_plan(
        cls,
        bench: Bench,
        choices: SkipChoices,
        formats: Mapping[str, Mapping[str, Sequence[str]]],
        linears: Linears,
    ) -> _Reading:
        """With experts in `formats` and other matrices in `linears`."""
        times = kernel_times(choices.target)
        stored, seconds = {}, {}
        for layout in bench.checkpoint.layouts:
            chosen, size, time = formats[layout.site], [0.0] * layout.experts, [0.0] * layout.experts
            for projection in layout.projections:
                _, rows, columns = layout.shape(projection)
                for expert, name in enumerate(chosen[projection]):
                    fmt = Format.parse(name)
                    size[expert] += fmt.stored_bits(rows, columns) / 8
                    time[expert] += 1e-6 * times.microseconds(rows, columns, fmt) if times.machine else 0.0
            stored[layout.site], seconds[layout.site] = size, time
        return cls(stored, seconds, _other_bytes(bench, linears), _other_speed(choices, choices.linears))

    def row(self, kept: Mapping[str, Sequence[int]], tokens: int) -> dict[str, Any]:
        """The fields of `SkipRow` for pairs `kept` of each expert by so many tokens."""
        active = sum(n * self.stored[site][e] for site, pairs in kept.items() for e, n in enumerate(pairs))
        time = sum(n * self.seconds[site][e] for site, pairs in kept.items() for e, n in enumerate(pairs))
        rate = None if self.other is None else 1 / (time / tokens + self.other.seconds)
        return {
            "active_bytes_per_token": round(active / tokens + self.other_bytes),
            "decode_tokens_per_s": rate,
        }


def _rows(
    plan: str,
    bits: float | None,
    settings: Sequence[tuple[str, float]],
    outcomes: Sequence[Outcome],
    reading: _Reading,
    tokens: int,
) -> list[SkipRow]:
    """One row for no pruning, then one for each of `settings`; `tokens` were run."""
    return [
        SkipRow(
            plan=plan,
            target_bits=bits,
            rule=rule,
            share=share,
            skipped_fraction=outcome.skipped,
            loss=outcome.loss,
            loss_increase=outcome.increase,
            standard_error=outcome.standard_error,
            kld=outcome.kld,
            **reading.row(outcome.kept, tokens),
        )
        for (rule, share), outcome in zip([(UNPRUNED, 0.0), *settings], outcomes, strict=True)
    ]


def _other_speed(choices: SkipChoices, linears: str) -> Speed | None:
    """Time of all that is no routed expert."""
    machine = choices.target.roofline
    if machine is None:
        return None
    storage = Storage(0.0, False, None if linears == "none" else Format.parse(linears))
    return other_speed(
        choices.model, footprint(choices.model, storage, choices.target.caches[0]), machine, context=0
    )


def _other_bytes(bench: Bench, linears: Linears) -> float:
    """Bytes of all weights but the routed experts' that a token reads: one row of a pure embedding table."""
    total = bench.other_bits(linears) / 8
    for site in find_linears(bench.mod):
        if set(site.uses) == {"embedding"}:
            fmt = linears.get(site.site)
            if fmt is None:
                stored = bench.checkpoint.load(f"{site.site}.weight").nbytes
            else:
                stored = fmt.stored_bits(site.rows, site.columns) // 8
            total -= stored * (1 - 1 / site.rows)
    return total
