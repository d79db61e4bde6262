"""Streamed runs that look at the inputs of every experts block, one site at a time, and can be resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moqc.calibrate.experts import ExpertWeights, routed
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.stream import ExpertsCall, Stream, split_batches
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.log import logger, track


@dataclass(frozen=True)
class Captured:
    """What one experts block was called with, all batches in a row.

    `x` float32 [T, H], `ids` int64 [T, k], `weights` float32 [T, k]; `batches`: tokens of each batch.
    """

    x: Tensor
    ids: Tensor
    weights: Tensor
    batches: tuple[int, ...]

    def per_token(self, of_batch: Tensor) -> Tensor:
        """Values [T] of the tokens, given those of the batches [B]."""
        return of_batch.repeat_interleave(torch.tensor(self.batches)).to(self.x.device)

    def routed(self, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(expert, tokens int64 [n], routing weights float32 [n]) of every hit expert."""
        for expert, tokens, slots in routed(self.ids, experts):
            yield expert, tokens, self.weights[tokens, slots]


@dataclass
class Recorder:
    """An experts function that keeps its inputs; outputs come from `weights`, or are zero without them.

    Zeros are right where only the inputs of the first block of a layer matter and the layer runs again later.
    """

    weights: Mapping[str, ExpertWeights]
    calls: dict[str, list[ExpertsCall]] = field(default_factory=dict)

    def __call__(self, call: ExpertsCall) -> Tensor:
        """Keep the inputs and compute the output."""
        self.calls.setdefault(call.site, []).append(call)
        weights = self.weights.get(call.site)
        return torch.zeros_like(call.x) if weights is None else weights.apply(call.x, call.ids, call.weights)

    def take(self, site: str) -> Captured:
        """What `site` was called with, which is forgotten here."""
        calls = self.calls.pop(site)
        return Captured(
            torch.cat([call.x for call in calls]),
            torch.cat([call.ids for call in calls]),
            torch.cat([call.weights for call in calls]),
            tuple(len(call.x) for call in calls),
        )


@dataclass(frozen=True)
class Batches:
    """Token batches of a calibration set: `tokens` int64 [n, window] each, and the dataset of each."""

    tokens: list[Tensor]
    dataset: list[int]

    @classmethod
    def of(cls, calibration: CalibrationSet) -> Batches:
        """Batches of one dataset each, datasets in order."""
        tokens: list[Tensor] = []
        dataset: list[int] = []
        for index, windows in enumerate(calibration.tokens):
            parts = split_batches(torch.from_numpy(windows))
            tokens += parts
            dataset += [index] * len(parts)
        return cls(tokens, dataset)


SiteAnalysis = Callable[[str, Captured, ExpertWeights], dict[str, Tensor]]
"""(site, its inputs, its weights) -> tensors to keep."""


def analyze_sites(
    model: LayeredModel,
    calibration: CalibrationSet,
    workspace: Workspace,
    key: str,
    analysis: SiteAnalysis,
    description: str,
) -> dict[str, str]:
    """Run `analysis` on every site in one full-precision pass and keep its tensors in the workspace.

    Returns site -> workspace key. Sites already there are not analyzed again: nothing runs if all are, and an
    interrupted run continues where it stopped.
    """
    keys = {site: digest(key, site) for site in model.layouts}
    missing = {site for site in keys if not workspace.has(keys[site])}
    if not missing:
        return keys
    if len(missing) < len(keys):
        logger.info("%s: %d of %d sites are cached", description, len(keys) - len(missing), len(keys))
    stream: Stream = model.start(Batches.of(calibration).tokens)
    last = max(index for index in range(model.layer_count) if missing & set(model.sites(index)))
    for index in track(range(last + 1), description):
        weights = {site: model.experts(site) for site in model.sites(index)}
        recorder = Recorder(weights)
        with model.layer(index) as layer:
            layer.run(stream, recorder)
        for site in weights:
            captured = recorder.take(site)
            if site in missing:
                with torch.inference_mode():
                    tensors = analysis(site, captured, weights[site])
                workspace.save_tensors(keys[site], tensors)
    return keys
