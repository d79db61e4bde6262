"""Routing seen on calibration text: the samples that pruning is calibrated on, and what pruning costs.

`collect_samples` fits what predicts the contribution of an expert from a token, and keeps of each experts
block, on some windows, the routing, the inner products of the outputs of each token's experts, and how the
loss moves with the block's output; what any pruning costs follows from them (`moqc.quant.skips`).
`measure_losses` runs the whole model with several prunings in one pass over its weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches, Captured, analyze_sites
from moqc.calibrate.experts import ExpertWeights, routed
from moqc.calibrate.gradients import run_backward
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.stream import ExpertsCall, ExpertsFunction, Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track
from moqc.quant.ridge import LEAST_PAIRS, Predictor
from moqc.quant.routing import Features, Pruning, gains, prune
from moqc.quant.skips import RoutingSample

VERSION = 3
"""Of what is measured here; part of the cache key."""

SAMPLE_TOKENS = 8192
TRUST = 0.5
"""Exponent of a token's predicted sensitivity in the contribution: gradients are noisy, hence less than 1."""
CHUNK = 1024
"""Tokens whose experts' outputs are in memory at a time."""


def collect_samples(
    checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace
) -> dict[str, RoutingSample]:
    """Measure, or take from the workspace, the routing of every site on about `SAMPLE_TOKENS` tokens."""
    model = LayeredModel(checkpoint)
    key = digest("routing", VERSION, checkpoint.fingerprint, calibration.fingerprint, SAMPLE_TOKENS)
    keys = {site: digest(key, site) for site in model.layouts}
    if not all(workspace.has(keys[site]) for site in keys):
        predictions = analyze_sites(
            model, calibration, workspace, digest(key, "norms"), _predict, "predicting outputs"
        )

        def analyze(site: str, captured: Captured, gradients: Tensor, weights: ExpertWeights) -> None:
            found = workspace.load_tensors(predictions[site])
            tensors = _measure(captured, gradients, weights, found["strength"], found["slopes"])
            workspace.save_tensors(keys[site], tensors)

        run_backward(model, Batches.of(calibration.head(SAMPLE_TOKENS)), analyze)
    window = calibration.tokens[0].shape[1]
    return {site: _sample(workspace.load_tensors(keys[site]), window) for site in keys}


def _predict(site: str, captured: Captured, weights: ExpertWeights) -> dict[str, Tensor]:
    """`strength` and `slopes` of each expert: what predicts its output's squared norm from the input."""
    predictor = Predictor.of(captured.x)
    count = weights.expert_count
    logs = torch.full((count,), torch.nan)
    slopes = torch.zeros(count, captured.x.shape[1])
    for expert, tokens, _ in captured.routed(count):
        x = captured.x[tokens]
        norms = torch.cat([weights.output(expert, part).square().sum(1) for part in torch.split(x, CHUNK)])
        if len(tokens) >= LEAST_PAIRS:
            logs[expert], slope = predictor.fit(x, norms)
            slopes[expert] = slope.cpu()
    # An expert that was hardly seen is as strong as the others are on average.
    logs = torch.where(logs.isnan(), logs.nanmean(), logs).nan_to_num()
    return {"strength": (0.5 * logs).exp(), "slopes": slopes}


def _measure(
    captured: Captured, gradients: Tensor, weights: ExpertWeights, strength: Tensor, slopes: Tensor
) -> dict[str, Tensor]:
    """The tensors of a `RoutingSample`."""
    x, ids = captured.x, captured.ids
    sensitivity = 0.5 * gradients.square().mean(1)
    if float(sensitivity.sum()) > 0:
        slopes = slopes + TRUST * Predictor.of(x).fit(x, sensitivity)[1].cpu()
    slopes = slopes.half()
    features = Features.of(x, torch.zeros(len(x)), gains(slopes.to(x.device), x, ids))
    grams = [_grams(weights, x[at : at + CHUNK], ids[at : at + CHUNK]) for at in range(0, len(x), CHUNK)]
    found = {
        "ids": ids.int(),
        "weights": captured.weights,
        "grams": torch.cat(grams),
        "peaks": features.peaks,
        "norms": features.norms,
        "gains": features.gains,
        "sensitivity": sensitivity,
        "strength": strength,
        "slopes": slopes,
    }
    return {name: tensor.cpu() for name, tensor in found.items()}


def _grams(weights: ExpertWeights, x: Tensor, ids: Tensor) -> Tensor:
    """Inner products float32 [T, k, k] of the outputs of each token's experts."""
    outputs = torch.zeros(*ids.shape, x.shape[1], device=x.device)
    for expert, tokens, slots in routed(ids, weights.expert_count):
        outputs[tokens, slots] = weights.output(expert, x[tokens])
    return outputs @ outputs.mT


def _sample(tensors: dict[str, Tensor], window: int) -> RoutingSample:
    peaks, norms, found = (tensors.pop(name) for name in ("peaks", "norms", "gains"))
    positions = torch.arange(window).repeat(len(peaks) // window)
    features = Features(peaks, norms, positions, found)
    return RoutingSample(ids=tensors.pop("ids").long(), features=features, **tensors)


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
