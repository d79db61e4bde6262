"""What published heuristics read of a block: how much it turns the residual stream, how its weights lie.

* `measure_similarity`: QuantMoE-Bench (arXiv 2406.08155, ``collect-mixtral-predictor-data.py``) calls a block
  important whose output, residual included, points elsewhere than its input.
* `weight_entropy`: EWQ (arXiv 2503.04704) calls a block important whose weights have a high entropy.
* `outlier_scores`: QuantMoE-Bench (``dump-mixtral-outlier-metric.py``) calls a linear important that has an
  input channel with a weight far above the channel's mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from moqc.calibrate.capture import Batches
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.stream import ExpertsCall, ExpertsFunction
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track

VERSION = 1
"""Of what is measured here; part of the cache keys."""


def measure_similarity(
    checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace, *, tokens: int = 8192
) -> dict[str, float]:
    """Site -> mean cosine similarity of the residual stream before and after the experts block is added.

    Before means the layer's output without the routed experts' part: a shared expert counts as residual.
    """
    calibration = calibration.head(tokens)
    key = digest("similarity", VERSION, checkpoint.fingerprint, calibration.fingerprint)
    if not workspace.has(key):
        workspace.save_json(key, _similarity(checkpoint, calibration))
    found: dict[str, float] = workspace.load_json(key)
    return found


def _similarity(checkpoint: Checkpoint, calibration: CalibrationSet) -> dict[str, float]:
    model = LayeredModel(checkpoint)
    stream = model.start(Batches.of(calibration).tokens)
    found: dict[str, float] = {}
    for index in track(range(model.layer_count), "measuring similarity"):
        keeping = _Keeping(model.original_experts(index))
        with model.layer(index) as layer:
            layer.run(stream, keeping)
        for site in model.sites(index):
            pairs = zip(keeping.outputs[site], stream.hidden, strict=True)
            rows = [cosine_similarity(after - added.view_as(after), after, dim=-1) for added, after in pairs]
            found[site] = float(torch.cat([row.flatten() for row in rows]).double().mean())
    return found


class _Keeping:
    """An experts function that keeps its outputs."""

    def __init__(self, experts: ExpertsFunction) -> None:
        self._experts = experts
        self.outputs: dict[str, list[Tensor]] = {}

    def __call__(self, call: ExpertsCall) -> Tensor:
        output = self._experts(call)
        self.outputs.setdefault(call.site, []).append(output)
        return output


@torch.inference_mode()
def weight_entropy(weights: ExpertWeights) -> float:
    """Mean over the expert matrices, weighted by size, of ``-Σ p log p``, p the softmax over all weights."""
    total, count = 0.0, 0
    for projection in weights.projections:
        flat = weights.matrices(projection).flatten(1).double()
        log_p = flat - flat.logsumexp(1, keepdim=True)
        entropy = -(log_p.exp() * log_p).sum(1)
        total += float(entropy.sum()) * flat.shape[1]
        count += flat.numel()
    return total / count


@torch.inference_mode()
def outlier_scores(matrices: Tensor) -> Tensor:
    """``max_j max_i |W_ij| / mean_i |W_ij|`` of matrices [E, N, K], by input channel j: float32 [E]."""
    magnitude = matrices.abs()
    return (magnitude.amax(1) / magnitude.mean(1).clamp(min=torch.finfo(torch.float32).tiny)).amax(1)
