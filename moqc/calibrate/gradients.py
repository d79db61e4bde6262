"""One backward pass: how the loss moves with the output of every experts block, token by token.

The pass goes forward layer by layer, keeping each layer's inputs, and backward the same way, running each
layer once more with gradients: memory holds one layer's graph, and the hidden states of all layers for the
tokens used. The loss is the sum of the cross entropies of all predictions, so the gradient at a token
includes what it does to later ones.

For a small error d in a block's output the change of the loss, averaged over errors of either sign, is about
``1/2 Σ_c (dL/dz_c)² d_c²``: the diagonal of the empirical Fisher information. GEMQ (arXiv 2605.23078) allots
bits to experts by this sum, with the errors of MC-MoE's rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches, Captured, Recorder
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.statistics import Sample, count_pairs, draw_sample
from moqc.calibrate.stream import ExpertsCall, Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track
from moqc.quant.device import compute_device
from moqc.quant.mcmoe import mcmoe_rtn
from moqc.quant.problem import MCMOE_BITS
from moqc.quant.versions import QUANTIZER_VERSIONS

VERSION = 1
"""Of what is measured here; part of the cache keys."""
TOKENS = 8192
"""Calibration tokens by default: hidden states of all layers are kept for so many."""


@dataclass(frozen=True)
class Gradients:
    """Results by site, read from the workspace a site at a time. `keys`: site -> workspace key."""

    keys: dict[str, str]
    workspace: Workspace

    def errors(self, site: str) -> list[list[float]]:
        """GEMQ's coefficients [E][1, 2, 3 bits]: ``Σ_t Σ_c (dL/dz_tc)² Δz_tc²``, by expert."""
        found: list[list[float]] = self.workspace.load_tensors(self.keys[site])["errors"].tolist()
        return found

    def power(self, site: str) -> float:
        """Mean over tokens and channels of ``(dL/dz)²``."""
        return float(self.workspace.load_tensors(self.keys[site])["power"])

    def sample(self, site: str) -> Sample:
        """Routed tokens with the squared gradients at the block's output, for weighing output errors."""
        return Sample.read(self.workspace.load_tensors(self.keys[site]))


def measure_gradients(
    checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace, *, tokens: int = TOKENS
) -> Gradients:
    """Run the backward pass on about `tokens` calibration tokens, or take its results from the workspace."""
    calibration = calibration.head(tokens)
    versions = [VERSION, QUANTIZER_VERSIONS["mcmoe"]]
    key = digest("gradients", versions, checkpoint.fingerprint, calibration.fingerprint)
    model = LayeredModel(checkpoint)
    keys = {site: digest(key, site) for site in model.layouts}
    if not all(workspace.has(keys[site]) for site in keys):
        batches, datasets = Batches.of(calibration), len(calibration.names)

        def analyze(site: str, captured: Captured, gradients: Tensor, weights: ExpertWeights) -> None:
            found = _site(captured, gradients, weights, batches.dataset, datasets)
            workspace.save_tensors(keys[site], found)

        run_backward(model, batches, analyze)
    return Gradients(keys, workspace)


GradientAnalysis = Callable[[str, Captured, Tensor, ExpertWeights], None]
"""(site, its inputs, gradients [T, H] of the summed loss at its output, its weights)."""


def run_backward(model: LayeredModel, batches: Batches, analyze: GradientAnalysis) -> None:
    """One forward and one backward pass; `analyze` is called for every site, the last layer's first."""
    stream = model.start(batches.tokens)
    inputs: list[list[Tensor]] = []
    for index in track(range(model.layer_count), "gradients, forward"):
        inputs.append(list(stream.hidden))
        with model.layer(index) as layer:
            layer.run(stream, model.original_experts(index))
    flow = model.loss_gradients(stream)
    for index in track(reversed(range(model.layer_count)), "gradients, backward", model.layer_count):
        weights = {site: model.experts(site) for site in model.sites(index)}
        taps = _Taps(Recorder(weights))
        with model.layer(index) as layer:
            flow = layer.pull_back(Stream(stream.tokens, inputs.pop(), stream.arguments), flow, taps)
        for site, block in weights.items():
            with torch.no_grad():
                captured = taps.recorder.take(site)
                analyze(site, captured, torch.cat(taps.gradients(site)), block)


class _Taps:
    """An experts function that keeps its inputs, and its outputs until they have a gradient."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self._outputs: dict[str, list[Tensor]] = {}

    def __call__(self, call: ExpertsCall) -> Tensor:
        """The block's output, whose gradient will be kept."""
        output = self.recorder(call)
        output.retain_grad()
        self._outputs.setdefault(call.site, []).append(output)
        return output

    def gradients(self, site: str) -> list[Tensor]:
        """Gradients [T, H] of the outputs of `site`, batch by batch."""
        return [
            torch.zeros_like(output) if output.grad is None else output.grad for output in self._outputs[site]
        ]


def _site(
    captured: Captured, gradients: Tensor, weights: ExpertWeights, dataset: list[int], datasets: int
) -> dict[str, Tensor]:
    squares = gradients.square()
    of_token = captured.per_token(torch.tensor(dataset))
    return {
        "tokens": torch.tensor(len(captured.x)),
        "pairs": count_pairs(captured, weights.expert_count, of_token, datasets),
        "errors": _errors(captured, squares, weights),
        "power": squares.double().mean().cpu(),
        **draw_sample(captured, weights.expert_count, of_token, curvature=squares),
    }


def _errors(captured: Captured, squares: Tensor, weights: ExpertWeights) -> Tensor:
    errors = torch.zeros(weights.expert_count, len(MCMOE_BITS), dtype=torch.float64, device=compute_device())
    for expert, tokens, gates in captured.routed(weights.expert_count):
        x, one = captured.x[tokens], weights.only(expert)
        exact = one.output(0, x)
        for column, bits in enumerate(MCMOE_BITS):
            rounded = {name: mcmoe_rtn(one.matrices(name), bits) for name in one.projections}
            change = (one.substitute(**rounded).output(0, x) - exact) * gates.unsqueeze(1)
            errors[expert, column] = (squares[tokens] * change.square()).sum(dtype=torch.float64)
    return errors
