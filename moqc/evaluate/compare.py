"""Plans side by side: the loss of the model with its experts quantized as each plan says.

Nothing is compiled: the quantized weights are evaluated by the reference forward, which is what compiled
kernels are tested against. Everything slow is cached in the workspace, the scores too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tvm import IRModule

from moqc.calibrate.quantize import quantize_experts, reference_forward
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.workspace import Workspace, digest
from moqc.describe import count_weights
from moqc.errors import BudgetError
from moqc.evaluate.metrics import Accumulator, Scores, mean_scores
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.ir.annotations import BITS
from moqc.ir.sites import find_experts
from moqc.log import logger
from moqc.package import WeightCounts
from moqc.passes.allocation_problem import TABLE_BITS
from moqc.passes.base import PassContext
from moqc.passes.quantize_linears import QuantizeLinears
from moqc.pipelines import Debug, Plan, allocation_pipeline, check_bits, run_passes
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.quant.tensor import Quantized
from moqc.quant.versions import QUANTIZER_VERSIONS

VERSION = 1
"""Of the evaluation; part of the key of cached scores."""


@dataclass(frozen=True)
class Row:
    """One plan at one budget. Bits are file bits per weight; `loss` and its increase are in nats."""

    plan: str
    allocator: str
    quantizer: str
    target_bits: float
    expert_file_bits_per_weight: float
    model_file_bits_per_weight: float
    loss: float
    loss_increase: float


@dataclass(frozen=True)
class Comparison:
    """All rows, and the unquantized model's loss on the same `tokens` predictions of the same files."""

    reference_loss: float
    tokens: int
    files: tuple[str, ...]
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; the keys of `rows` are the fields of `Row`."""
        return asdict(self)


def compare_plans(
    ctx: PassContext,
    windows: Mapping[str, NDArray[np.int64]],
    plans: Sequence[tuple[str, Plan]],
    bits: Sequence[float],
    *,
    linears: str = "none",
) -> Comparison:
    """Evaluate each of `plans` (its text and itself) at each number of `bits` on the same windows.

    `windows`: file name -> int64 [n, window]. `linears`: format of the other matrices, or "none": as stored.
    A pair of plan and bits that is out of reach is left out with a warning; BudgetError when none is left.
    """
    for target in bits:
        check_bits(target)
    bench = _Bench.open(ctx, windows, linears)
    planned: list[tuple[str, Plan, float, IRModule]] = []
    unreachable: list[str] = []
    for target in bits:
        for text, plan in plans:
            logger.info("planning %s at %g bits", text, target)
            try:
                planned.append((text, plan, target, bench.plan(plan, target)))
            except BudgetError as error:
                unreachable.append(f"{text} at {target:g} bits: {error}")
    if not planned:
        raise BudgetError("; ".join(unreachable))
    for reason in unreachable:
        logger.warning("left out: %s", reason)
    reference = bench.score(None)
    rows = [bench.row(text, plan, target, mod, reference.loss) for text, plan, target, mod in planned]
    return Comparison(reference.loss, reference.tokens, tuple(windows), tuple(rows))


@dataclass
class _Bench:
    """One model and one text, on which plans are tried."""

    ctx: PassContext
    mod: IRModule
    checkpoint: Checkpoint
    workspace: Workspace
    windows: Mapping[str, NDArray[np.int64]]
    linear_formats: dict[str, Format]
    counts: WeightCounts
    _linears: dict[str, Quantized] = field(default_factory=dict)

    @classmethod
    def open(cls, ctx: PassContext, windows: Mapping[str, NDArray[np.int64]], linears: str) -> _Bench:
        checkpoint: Checkpoint = ctx.need("checkpoint", "compare")
        workspace: Workspace = ctx.need("workspace", "compare")
        mod = import_model(checkpoint)
        formats = QuantizeLinears(linears=linears, embeddings=linears).plan(mod)
        return cls(ctx, mod, checkpoint, workspace, windows, formats, count_weights(mod, checkpoint))

    def plan(self, plan: Plan, target: float) -> IRModule:
        """The module with the bits of `plan`. Raises BudgetError where it cannot reach the budget."""
        return run_passes(allocation_pipeline(plan, target), self.mod, self.ctx, Debug())

    def row(self, text: str, plan: Plan, target: float, planned: IRModule, reference: float) -> Row:
        """Quantize and evaluate one plan."""
        logger.info("evaluating %s at %g bits", text, target)
        store = quantize_experts(
            self.checkpoint, BITS.of(planned), plan.quantizer, self.ctx.calibration, self.workspace
        )
        expert_bits = store.stored_bits() + sum(site.experts * TABLE_BITS for site in find_experts(self.mod))
        loss = self.score(store).loss
        return Row(
            plan=text,
            allocator=plan.allocator,
            quantizer=plan.quantizer,
            target_bits=target,
            expert_file_bits_per_weight=expert_bits / self.counts.expert_weights,
            model_file_bits_per_weight=(expert_bits + self._other_bits) / self.counts.model_weights,
            loss=loss,
            loss_increase=loss - reference,
        )

    def score(self, store: ExpertStore | None) -> Scores:
        """Scores with the experts of `store`, or of the unquantized model; cached."""
        formats = {} if store is None else {site: str(fmt) for site, fmt in self.linear_formats.items()}
        keys = [] if store is None else list(store.keys.values())
        names, arrays = list(self.windows), list(self.windows.values())
        versions = [VERSION, QUANTIZER_VERSIONS["rtn"]]  # of the linears; the experts' keys have their own
        key = digest("scores", versions, self.checkpoint.fingerprint, keys, formats, names, arrays)
        if not self.workspace.has(key):
            linears = {} if store is None else self._quantized_linears()
            logits = reference_forward(
                self.checkpoint, torch.from_numpy(np.concatenate(arrays)), store, linears=linears
            )
            self.workspace.save_json(key, asdict(_score(arrays, logits)))
        return Scores(**self.workspace.load_json(key))

    def _quantized_linears(self) -> dict[str, Quantized]:
        """Site -> matrix, made when first used; a tied parameter gets the matrix of the stored one."""
        if not self._linears:
            for site, fmt in self.linear_formats.items():
                self._linears[site] = quantize_rtn(self.checkpoint.load(f"{site}.weight").float(), fmt)
            for name, stored in self.checkpoint.tied.items():
                origin = stored.removesuffix(".weight")
                if origin in self.linear_formats:
                    self._linears[name.removesuffix(".weight")] = self._linears[origin]
        return self._linears

    @cached_property
    def _other_bits(self) -> int:
        """Stored bits of everything but the matrices of routed experts."""
        experts = {
            layout.source(projection)
            for layout in self.checkpoint.layouts
            for projection in layout.projections
        }
        total = 0
        for name in self.checkpoint.names:
            if name in experts or name in self.checkpoint.tied:
                continue
            fmt = self.linear_formats.get(name.removesuffix(".weight"))
            shape = self.checkpoint.shape(name)
            if fmt is not None and len(shape) == 2:
                total += fmt.stored_bits(*shape)
            else:
                tensor = self.checkpoint.load(name)
                total += 8 * tensor.element_size() * tensor.numel()
        return total


def _score(files: Sequence[NDArray[np.int64]], batches: Iterable[Tensor]) -> Scores:
    """Mean scores of the files, whose windows come one after the other in the batches of logits."""
    accumulators = [Accumulator() for _ in files]
    owners = np.concatenate([np.full(len(windows), number) for number, windows in enumerate(files)])
    tokens = np.concatenate(files)
    start = 0
    for logits in batches:
        rows = slice(start, start + len(logits))
        for number in np.unique(owners[rows]):
            mine = owners[rows] == number
            accumulators[number].add(tokens[rows][mine], logits.numpy()[mine])
        start += len(logits)
    return mean_scores([accumulator.scores() for accumulator in accumulators])
