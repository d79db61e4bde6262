"""Routing seen on calibration text: the samples that pruning is calibrated on, and what pruning costs.

`collect_samples` keeps of each experts block, on some windows, the routing and the inner products of the
outputs of each token's experts; the error of any pruning follows from them (`moqc.quant.skips`).
`measure_losses` runs the whole model with several prunings in one pass over its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moqc.calibrate.capture import Captured, analyze_sites
from moqc.calibrate.experts import ExpertWeights, routed
from moqc.calibrate.layers import ExpertsCall, ExpertsFunction, LayeredModel, Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track
from moqc.quant.routing import Features, Pruning, prune
from moqc.quant.skips import RoutingSample

VERSION = 1
"""Of what is measured here; part of the cache key."""

SAMPLE_TOKENS = 8192
CHUNK = 1024
"""Tokens whose experts' outputs are in memory at a time."""


def collect_samples(
    checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace
) -> dict[str, RoutingSample]:
    """Measure, or take from the workspace, the routing of every site on about `SAMPLE_TOKENS` tokens."""
    model = LayeredModel(checkpoint)
    window = calibration.tokens[0].shape[1]
    key = digest("routing", VERSION, checkpoint.fingerprint, calibration.fingerprint, SAMPLE_TOKENS)

    def analyze(site: str, captured: Captured, weights: ExpertWeights) -> dict[str, Tensor]:
        return _measure(captured, weights, window)

    keys = analyze_sites(model, calibration, workspace, key, analyze, "collecting routing")
    return {site: _sample(workspace.load_tensors(keys[site])) for site in keys}


def _measure(captured: Captured, weights: ExpertWeights, window: int) -> dict[str, Tensor]:
    """The tensors of a `RoutingSample`, from windows spread evenly over the text."""
    windows = len(captured.x) // window
    chosen = torch.linspace(0, windows - 1, min(windows, max(1, SAMPLE_TOKENS // window))).round().long()
    tokens = (chosen[:, None] * window + torch.arange(window)).flatten()
    x, ids, shares = captured.x[tokens], captured.ids[tokens], captured.weights[tokens]
    features = Features.of(x, torch.arange(window).repeat(len(chosen)))
    grams = [_grams(weights, x[at : at + CHUNK], ids[at : at + CHUNK]) for at in range(0, len(x), CHUNK)]
    return {
        "experts": torch.tensor(weights.expert_count),
        "ids": ids.int(),
        "weights": shares,
        "grams": torch.cat(grams),
        "peaks": features.peaks,
        "norms": features.norms,
        "positions": features.positions.int(),
    }


def _grams(weights: ExpertWeights, x: Tensor, ids: Tensor) -> Tensor:
    """Inner products float32 [T, k, k] of the outputs of each token's experts."""
    outputs = torch.zeros(*ids.shape, x.shape[1], device=x.device)
    for expert, tokens, slots in routed(ids, weights.expert_count):
        outputs[tokens, slots] = weights.output(expert, x[tokens])
    return outputs @ outputs.mT


def _sample(tensors: dict[str, Tensor]) -> RoutingSample:
    features = Features(tensors["peaks"], tensors["norms"], tensors["positions"].long())
    return RoutingSample(
        int(tensors["experts"]), tensors["ids"].long(), tensors["weights"], tensors["grams"], features
    )


@dataclass
class PrunedExperts:
    """An experts function that prunes the routing of another; it counts pairs and bytes by site.

    `window`: length of the sequences, of which every call has whole ones. `chosen` and `kept`: site -> pairs
    of each expert, int64 [E], before and after.
    """

    prunings: Mapping[str, Pruning]
    window: int
    chosen: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def around(self, function: ExpertsFunction) -> ExpertsFunction:
        """`function` behind the pruning."""

        def run(call: ExpertsCall) -> Tensor:
            return function(self._prune(call))

        return run

    def _prune(self, call: ExpertsCall) -> ExpertsCall:
        positions = torch.arange(self.window).repeat(len(call.x) // self.window)
        pruning = self.prunings.get(call.site)
        ids, weights = call.ids, call.weights
        if pruning is not None:  # the rules are on the CPU; a device may run the model
            pruned = prune(pruning, call.x.cpu(), ids.cpu(), weights.cpu(), positions)
            ids, weights = (tensor.to(call.x.device) for tensor in pruned)
        self._count(self.chosen, call.site, call.ids)
        self._count(self.kept, call.site, ids)
        return replace(call, ids=ids, weights=weights)

    def _count(self, counts: dict[str, Tensor], site: str, ids: Tensor) -> None:
        before = counts.get(site, torch.zeros(0, dtype=torch.int64))
        found = torch.bincount(ids[ids >= 0].flatten().cpu(), minlength=len(before))
        counts[site] = found + torch.nn.functional.pad(before, (0, len(found) - len(before)))

    @property
    def skipped(self) -> float:
        """Share of all pairs that were dropped."""
        chosen = sum(int(counts.sum()) for counts in self.chosen.values())
        kept = sum(int(counts.sum()) for counts in self.kept.values())
        return 1 - kept / chosen if chosen else 0.0


def measure_losses(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    workspace: Workspace,
    candidates: Sequence[Mapping[str, Pruning]],
    key: str,
    *,
    tokens: int = 8192,
) -> list[float]:
    """By how many nats each of `candidates` (site -> pruning) raises the loss on about `tokens` tokens.

    The model is unquantized; all candidates share one pass over its weights. `key` names the candidates in
    the cache.
    """
    entry = digest("skip-losses", VERSION, checkpoint.fingerprint, calibration.fingerprint, key, tokens)
    if not workspace.has(entry):
        workspace.save_json(entry, _losses(checkpoint, calibration, candidates, tokens))
    found: list[float] = workspace.load_json(entry)
    return found


def _losses(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    candidates: Sequence[Mapping[str, Pruning]],
    tokens: int,
) -> list[float]:
    model = LayeredModel(checkpoint)
    window = calibration.tokens[0].shape[1]
    share = max(1, tokens // (window * len(calibration.tokens)))
    clean = model.start([torch.from_numpy(windows[:share]) for windows in calibration.tokens])
    streams = [clean, *(clean.fork() for _ in candidates)]
    for index in track(range(model.layer_count), "measuring the cost of skipping"):
        original = model.original_experts(index)
        with model.layer(index) as layer:
            layer.run(streams[0], original)
            for stream, prunings in zip(streams[1:], candidates, strict=True):
                layer.run(stream, PrunedExperts(prunings, window).around(original))
    losses = [_loss(model, stream) for stream in streams]
    return [loss - losses[0] for loss in losses[1:]]


def _loss(model: LayeredModel, stream: Stream) -> float:
    """Mean next-token cross entropy in nats."""
    total, count = 0.0, 0
    for tokens, logits in zip(stream.tokens, model.logits(stream), strict=True):
        targets = tokens[:, 1:].unsqueeze(-1)
        total -= float(logits[:, :-1].log_softmax(-1).gather(-1, targets).double().sum())
        count += targets.numel()
    return total / count
