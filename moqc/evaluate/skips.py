"""Rules of expert pruning side by side: what skipping costs, and what a token still reads.

All rules skip the same share of the experts' work on the calibration text. They are evaluated on the same
windows as plans are (`moqc.evaluate.compare`), by the reference forward, with and without quantized experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moqc.calibrate.layers import ExpertsFunction, LayeredModel, Stream, split_batches
from moqc.calibrate.quantize import experts_function, overridden, quantize_experts
from moqc.calibrate.routing import PrunedExperts
from moqc.calibrate.skipping import VERSION as SKIPPING_VERSION
from moqc.calibrate.skipping import Skipping
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.workspace import digest
from moqc.errors import UserError
from moqc.evaluate.bench import Bench, Linears
from moqc.evaluate.metrics import Accumulator, Scores, mean_scores
from moqc.ir.annotations import BITS
from moqc.ir.sites import find_linears
from moqc.log import logger
from moqc.options import Debug
from moqc.passes.base import PassContext
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.pipelines import Plan, allocation_pipeline, check_bits, run_passes
from moqc.quant.formats import Format
from moqc.quant.routing import Pruning
from moqc.quant.skips import RULES

VERSION = 1
"""Of the evaluation; part of the key of cached scores."""

UNPRUNED = "none"
"""`rule` of a row without pruning, `plan` of one without quantization."""


@dataclass(frozen=True)
class SkipRow:
    """One rule on one plan. Losses are in nats.

    `loss_increase` is over the same weights without pruning, `kld` the mean KL divergence from the model
    unquantized and unpruned. `skipped_fraction` is the share of (token, expert) pairs skipped on the text.
    `active_bytes_per_token`: stored bytes of all weights that decoding a token reads, with the experts that
    it keeps.
    """

    plan: str
    target_bits: float | None
    rule: str
    skipped_fraction: float
    loss: float
    loss_increase: float
    kld: float
    active_bytes_per_token: int


@dataclass(frozen=True)
class SkipComparison:
    """All rows; `share` is what was asked for, `tokens` the predictions scored in `files`."""

    share: float
    tokens: int
    files: tuple[str, ...]
    rows: tuple[SkipRow, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the keys of `rows` are the fields of `SkipRow`."""
        return asdict(self)


def check_rules(rules: Sequence[str]) -> None:
    """Raise UserError for an unknown rule, or none at all."""
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown or not rules:
        raise UserError(f"pruning rules {', '.join(unknown) or '(none)'}: known are {', '.join(RULES)}")


def compare_skips(
    ctx: PassContext,
    bench: Bench,
    windows: Mapping[str, Any],
    plans: Sequence[tuple[str, Plan]],
    bits: Sequence[float],
    share: float,
    rules: Sequence[str],
    *,
    linears: str = "none",
) -> SkipComparison:
    """Evaluate each of `rules` on the unquantized model and on each plan at each number of bits.

    `windows`: file name -> int64 [n, window]; `linears` as for `compare_plans`. Raises BudgetError for a plan
    out of reach.
    """
    check_rules(rules)
    for target in bits:
        check_bits(target)
    others = QuantizeLinears(linears=linears, embeddings=linears).plan(bench.mod)
    calibration = ctx.need("calibration", "compare")
    skipping = Skipping.of(bench.checkpoint, calibration, bench.workspace)
    prunings = {rule: skipping.prunings(rule, share) for rule in rules}
    planned = [
        (text, plan, target, BITS.of(run_passes(allocation_pipeline(plan, target), bench.mod, ctx, Debug())))
        for target in bits
        for text, plan in plans
    ]
    task = _Task(bench, skipping, windows, prunings, share)
    rows = _rows(_Group(task, None, {}), UNPRUNED, None, _stored_bytes(bench))
    for text, plan, target, formats in planned:
        logger.info("evaluating %s at %g bits", text, target)
        store = quantize_experts(
            bench.checkpoint, formats, plan.quantizer, calibration, bench.workspace, rotate=plan.rotates
        )
        rows += _rows(_Group(task, store, others), text, target, _planned_bytes(bench, formats))
    tokens = sum(array.shape[0] * (array.shape[1] - 1) for array in windows.values())
    return SkipComparison(share, tokens, tuple(windows), tuple(rows))


ExpertBytes = Mapping[str, Sequence[float]]
"""site -> stored bytes of each expert."""


def _stored_bytes(bench: Bench) -> ExpertBytes:
    """As the checkpoint has them."""
    found = {}
    for layout in bench.checkpoint.layouts:
        total = 0.0
        for projection in layout.projections:
            _, rows, columns = layout.shape(projection)
            total += rows * columns * bench.checkpoint.load(layout.source(projection), 0).element_size()
        found[layout.site] = [total] * layout.experts
    return found


def _planned_bytes(bench: Bench, formats: Mapping[str, Mapping[str, Sequence[str]]]) -> ExpertBytes:
    found = {}
    for layout in bench.checkpoint.layouts:
        shapes = {name: layout.shape(name)[1:] for name in layout.projections}
        found[layout.site] = [
            sum(Format.parse(formats[layout.site][name][e]).stored_bits(*shapes[name]) / 8 for name in shapes)
            for e in range(layout.experts)
        ]
    return found


@dataclass(frozen=True)
class _Task:
    """What all groups of rows have in common: the text, and the prunings of each rule."""

    bench: Bench
    skipping: Skipping
    windows: Mapping[str, Any]
    prunings: Mapping[str, Mapping[str, Pruning]]
    share: float


@dataclass(frozen=True)
class _Group:
    """All rules on one set of weights: experts of `store` (None: as stored), other matrices in `linears`."""

    task: _Task
    store: ExpertStore | None
    linears: Linears

    def measure(self) -> dict[str, Any]:
        """Scores, and kept pairs by expert, of each rule and of none; cached."""
        task, workspace = self.task, self.task.bench.workspace
        formats = {site: str(fmt) for site, fmt in self.linears.items()}
        keys = [] if self.store is None else list(self.store.keys.values())
        key = digest(
            "skips",
            [VERSION, SKIPPING_VERSION],
            task.skipping.key,
            [keys, formats, list(task.prunings), task.share],
            list(task.windows),
            list(task.windows.values()),
        )
        if not workspace.has(key):
            workspace.save_json(key, self._run())
        found: dict[str, Any] = workspace.load_json(key)
        return found

    def _run(self) -> dict[str, Any]:
        arrays = list(self.task.windows.values())
        tokens = np.concatenate(arrays)
        owners = np.concatenate([np.full(len(windows), number) for number, windows in enumerate(arrays)])
        rules: dict[str, Mapping[str, Pruning]] = {UNPRUNED: {}, **self.task.prunings}
        counters = {rule: PrunedExperts(prunings, tokens.shape[1]) for rule, prunings in rules.items()}
        scores = {rule: [Accumulator() for _ in arrays] for rule in counters}
        start = 0
        for reference, outputs in self._logits(torch.from_numpy(tokens), counters):
            rows = slice(start, start + len(reference))
            for rule, logits in zip(counters, outputs, strict=True):
                for number in np.unique(owners[rows]):
                    mine = owners[rows] == number
                    parts = (tokens[rows][mine], logits.cpu().numpy()[mine], reference.cpu().numpy()[mine])
                    scores[rule][number].add(*parts)
            start += len(reference)
        return {
            rule: {
                "scores": asdict(mean_scores([accumulator.scores() for accumulator in scores[rule]])),
                "skipped": counter.skipped,
                "kept": {site: counts.tolist() for site, counts in counter.kept.items()},
            }
            for rule, counter in counters.items()
        }

    def _logits(
        self, tokens: Tensor, counters: Mapping[str, PrunedExperts]
    ) -> Iterator[tuple[Tensor, Iterator[Tensor]]]:
        """For each batch: logits of the unquantized model, and those of each of `counters`, one at a time."""
        bench, batches = self.task.bench, split_batches(tokens)
        model = overridden(bench.checkpoint, bench.quantized(self.linears))
        streams = _forward(model, batches, list(counters.values()), self.store)
        if self.store is None:
            plain, reference = model, streams[0]
        else:
            plain = LayeredModel(bench.checkpoint)
            reference = _forward(plain, batches, [PrunedExperts({}, tokens.shape[1])], None)[0]
        for number, batch in enumerate(batches):
            one = Stream([batch], [reference.hidden[number]], [reference.arguments[number]])
            joint = Stream(
                [batch] * len(streams),
                [stream.hidden[number] for stream in streams],
                [streams[0].arguments[number]] * len(streams),
            )
            (wanted,) = plain.logits(one)
            yield wanted, model.logits(joint)


def _forward(
    model: LayeredModel, batches: list[Tensor], counters: Sequence[PrunedExperts], store: ExpertStore | None
) -> list[Stream]:
    """The final hidden states of each of `counters`, in one pass over the weights."""
    first = model.start(batches)
    streams = [first.fork() for _ in counters]
    for index in range(model.layer_count):
        experts: ExpertsFunction = experts_function(model, index, store, "float")
        with model.layer(index) as layer:
            for stream, counter in zip(streams, counters, strict=True):
                layer.run(stream, counter.around(experts))
    return streams


def _rows(group: _Group, plan: str, target: float | None, expert_bytes: ExpertBytes) -> list[SkipRow]:
    measured = group.measure()
    base = Scores(**measured[UNPRUNED]["scores"]).loss
    others = _other_bytes(group.task.bench, group.linears)
    tokens = sum(array.size for array in group.task.windows.values())
    rows = []
    for rule, found in measured.items():
        scores = Scores(**found["scores"])
        active = sum(
            pairs * expert_bytes[site][expert]
            for site, counts in found["kept"].items()
            for expert, pairs in enumerate(counts)
        )
        rows.append(
            SkipRow(
                plan=plan,
                target_bits=target,
                rule=rule,
                skipped_fraction=found["skipped"],
                loss=scores.loss,
                loss_increase=scores.loss - base,
                kld=scores.kld_mean or 0.0,
                active_bytes_per_token=round(active / tokens + others),
            )
        )
    return rows


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
