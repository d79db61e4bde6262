"""What quantizing costs: measured output errors of the experts blocks, and how much the layers matter.

* `measure_costs`: the error that the real quantizer leaves in a block's output when one unit (one projection
  of one expert) is quantized alone, for every candidate format.
* `measure_block_errors`: the error of the block with one whole expert quantized by MC-MoE's plain rounding,
  the coefficient of its allocation (arXiv 2410.06270, ``awareness.py``).
* `measure_sensitivity`: nats of KL divergence at the model's output per unit of squared error of one block's
  output, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches, Captured, analyze_sites
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.gradients import Gradients
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.statistics import VERSION as STATISTICS_VERSION
from moqc.calibrate.statistics import Sample, SiteStatistics, Statistics
from moqc.calibrate.stream import ExpertsCall, ExpertsFunction, Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track
from moqc.quant.activations import parse_activation
from moqc.quant.formats import Format
from moqc.quant.mcmoe import mcmoe_rtn
from moqc.quant.problem import MCMOE_BITS
from moqc.quant.quantizers import STORABLE
from moqc.quant.versions import QUANTIZER_VERSIONS

VERSION = 5
"""Of what is measured here; part of every cache key, as are the versions of the quantizers."""

NOISE = 0.1
"""Norm of the noise that probes a block, relative to its output of the same token.

The result depends on it where routers follow: tokens whose experts flip add a divergence that grows like the
noise, not like its square. On tiny-moe the first block's is 0.0207 at 0.02, 0.0104 at 0.1 and 0.0098 at 0.3
and the last block's, with no router after it, 0.0005 at all of them. 0.1 is near what low-bit formats do.
"""


class UnitCosts(TypedDict):
    """Costs of one projection in one format: by dataset and expert, and by expert under even routing."""

    datasets: list[list[float]]
    even: list[float]


SiteCosts = dict[str, dict[str, UnitCosts]]
"""projection -> format name -> costs."""


def measure_costs(
    checkpoint: Checkpoint,
    statistics: Statistics,
    formats: Sequence[Format],
    *,
    quantizer: str = "gptq",
    gradients: Gradients | None = None,
    by_token: bool = False,
    rotate: bool = False,
    held_out: bool = False,
) -> dict[str, SiteCosts]:
    """Costs of all units: site -> projection -> format -> `UnitCosts`, cached by site and format.

    The number is ``Σ_t g_t² ‖E(x_t) - E_q(x_t)‖²`` over the dataset's tokens routed to the expert, per token
    of the dataset, taken from a `Sample`, with this unit alone quantized by `quantizer`, one of `STORABLE`;
    ``even``: on text that uses all experts alike (`Sample.even`). With `gradients` it is multiplied by the
    mean squared gradient of the loss in the expert's output; or, `by_token`, every component of the error by
    that at this very place, on the tokens that have gradients. `rotate`: the inputs of down are rotated.
    `held_out`: errors are of tokens that the quantizer's Hessians do not see (`Sample.held_out`).
    """
    workspace, version = statistics.workspace, QUANTIZER_VERSIONS[quantizer]
    model = LayeredModel(checkpoint)
    costs: dict[str, SiteCosts] = {}
    for site in track(statistics.sites, "measuring costs"):
        source = [statistics.keys[site], gradients.keys[site] if gradients is not None and by_token else None]
        source += ["rotated"] * rotate + ["held out"] * held_out
        keys = {fmt: digest("costs", VERSION, version, source, quantizer, str(fmt)) for fmt in formats}
        missing = [fmt for fmt in formats if not workspace.has(keys[fmt])]
        needed = bool(missing) or not by_token  # what is cached by token has them in it
        slopes = gradients.sample(site) if gradients is not None and needed else None
        if missing:
            weights, measured = model.experts(site), statistics.of(site)
            sample = _sample(measured, slopes if by_token else None, held_out)
            weights = weights.rotated() if rotate else weights
            found = _site_costs(weights, measured, sample, missing, quantizer, held_out)
            for fmt in missing:
                workspace.save_json(keys[fmt], found[fmt])
        curvature = None if by_token or slopes is None else _by_expert(slopes)
        costs[site] = _by_projection({str(f): workspace.load_json(keys[f]) for f in formats}, curvature)
    return costs


def _sample(measured: SiteStatistics, slopes: Sample | None, held_out: bool) -> Sample:
    """The tokens on which errors are measured; how often experts are used is of all tokens."""
    sample = measured.sample
    if slopes is not None:
        sample = replace(slopes, pairs=measured.pairs, tokens=measured.tokens)
    return sample.held_out() if held_out else sample


def _by_expert(sample: Sample) -> list[float]:
    """Mean squared gradient of the loss in what each expert contributes to, leaning on that of all."""
    assert sample.curvature is not None
    curvature: list[float] = sample.leaning(sample.curvature.mean(2)).tolist()
    return curvature


def _by_projection(
    by_format: Mapping[str, Mapping[str, UnitCosts]], curvature: Sequence[float] | None
) -> SiteCosts:
    """Costs [format][projection] as [projection][format], times `curvature` [expert] if given."""

    def weighted(values: list[float]) -> list[float]:
        return (
            values if curvature is None else [value * c for value, c in zip(values, curvature, strict=True)]
        )

    return {
        name: {
            fmt: {
                "datasets": [weighted(row) for row in found[name]["datasets"]],
                "even": weighted(found[name]["even"]),
            }
            for fmt, found in by_format.items()
        }
        for name in next(iter(by_format.values()))
    }


@torch.inference_mode()
def _site_costs(
    weights: ExpertWeights,
    measured: SiteStatistics,
    sample: Sample,
    formats: Sequence[Format],
    quantizer: str,
    held_out: bool,
) -> dict[Format, dict[str, UnitCosts]]:
    """Format -> costs of each projection."""
    exact = weights.output(slice(None), sample.x)
    costs: dict[Format, dict[str, UnitCosts]] = {fmt: {} for fmt in formats}
    for projection in weights.projections:
        hessians = None
        if not STORABLE[quantizer].data_free:
            hessians = _hessians(weights, measured, sample if held_out else None, projection)
        made = STORABLE[quantizer].each(weights.matrices(projection), hessians, formats)
        for fmt, quantized in zip(formats, made, strict=True):
            block = weights.substitute(**{projection: quantized.dequantize()})
            squared = (block.output(slice(None), sample.x) - exact).square_()
            if sample.curvature is not None:
                squared *= sample.curvature
            errors = squared.sum(2)
            costs[fmt][projection] = {
                "datasets": sample.totals(errors * sample.weights.square()).tolist(),
                "even": sample.even(errors).tolist(),
            }
    return costs


def _hessians(
    weights: ExpertWeights, measured: SiteStatistics, without: Sample | None, projection: str
) -> Tensor:
    rotated = parse_activation(weights.activation).rotated
    if without is None:
        return measured.hessians(projection, rotated=rotated).matrices
    inputs = weights.hidden(slice(None), without.x) if projection == "down" else without.x
    return measured.hessians(projection, rotated=rotated, without=(without, inputs)).matrices


def measure_block_errors(
    checkpoint: Checkpoint, calibration: CalibrationSet, workspace: Workspace
) -> dict[str, list[list[float]]]:
    """MC-MoE's coefficients: site -> [E][1, 2 and 3 bits].

    ``Σ_batches ‖block(x) - block(x; expert quantized)‖_F`` with full-precision inputs, groups of 128.
    """
    versions = [VERSION, STATISTICS_VERSION, QUANTIZER_VERSIONS["mcmoe"]]
    key = digest("block-errors", versions, checkpoint.fingerprint, calibration.fingerprint)
    model = LayeredModel(checkpoint)
    keys = analyze_sites(model, calibration, workspace, key, _block_errors, "measuring block errors")
    return {site: workspace.load_tensors(keys[site])["errors"].tolist() for site in keys}


def _block_errors(site: str, captured: Captured, weights: ExpertWeights) -> dict[str, Tensor]:
    errors = torch.zeros(weights.expert_count, len(MCMOE_BITS), dtype=torch.float64)
    batch_of = captured.per_token(torch.arange(len(captured.batches)))
    for expert, tokens, gates in captured.routed(weights.expert_count):
        x = captured.x[tokens]
        exact = weights.output(expert, x)
        for column, bits in enumerate(MCMOE_BITS):
            one = slice(expert, expert + 1)
            changed = {name: mcmoe_rtn(weights.matrices(name)[one], bits) for name in weights.projections}
            difference = weights.only(expert).substitute(**changed).output(0, x) - exact
            squared = difference.double().square().sum(1) * gates.double().square()
            norms = torch.bincount(batch_of[tokens], squared, minlength=len(captured.batches)).sqrt()
            errors[expert, column] = norms.sum()
    return {"errors": errors}


def measure_sensitivity(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    workspace: Workspace,
    *,
    tokens: int = 2048,
    noise: float = NOISE,
    seed: int = 0,
) -> dict[str, float]:
    """Nats of KL divergence per unit of squared error in the output of each site's block.

    Gaussian noise, of `noise` times the output's norm for each token, is added to the output of one site at a
    time on about `tokens` tokens spread over the datasets; the mean KL divergence of the model's output from
    the clean one, over the mean squared norm of the noise, is the result.
    """
    key = digest("sensitivity", VERSION, checkpoint.fingerprint, calibration.fingerprint, tokens, noise, seed)
    if not workspace.has(key):
        workspace.save_json(key, _sensitivity(checkpoint, calibration, tokens, noise, seed))
    found: dict[str, float] = workspace.load_json(key)
    return found


def _sensitivity(
    checkpoint: Checkpoint, calibration: CalibrationSet, tokens: int, noise: float, seed: int
) -> dict[str, float]:
    model = LayeredModel(checkpoint)
    clean = model.start(Batches.of(calibration.head(tokens)).tokens)
    noisy: dict[str, tuple[Stream, _Noise]] = {}
    # One pass over the weights: a second stream forks off at every site, and all of them move on together.
    for index in track(range(model.layer_count), "measuring sensitivity"):
        original = model.original_experts(index)
        forks = {site: (clean.fork(), _Noise(original, site, noise, seed)) for site in model.sites(index)}
        with model.layer(index) as layer:
            for stream, _ in noisy.values():
                layer.run(stream, original)
            for stream, probe in forks.values():
                layer.run(stream, probe)
            layer.run(clean, original)
        noisy |= forks
    divergence = _divergences(model, clean, {site: stream for site, (stream, _) in noisy.items()})
    return {site: divergence[site] / probe.mean_square for site, (_, probe) in noisy.items()}


class _Noise:
    """An experts function that disturbs the output of one site and sums up by how much."""

    def __init__(self, original: ExpertsFunction, site: str, size: float, seed: int) -> None:
        self._original, self._site, self._size = original, site, size
        self._generator = torch.Generator().manual_seed(seed)
        self._squares, self._tokens = 0.0, 0

    def __call__(self, call: ExpertsCall) -> Tensor:
        """The original output, disturbed at this probe's site."""
        output = self._original(call)
        if call.site != self._site:
            return output
        disturbance = torch.randn(output.shape, generator=self._generator).to(output.device)
        disturbance *= self._size * output.norm(dim=1, keepdim=True) / math.sqrt(output.shape[1])
        self._squares += float(disturbance.double().square().sum())
        self._tokens += len(output)
        return output + disturbance

    @property
    def mean_square(self) -> float:
        """Mean squared norm of the noise a token."""
        return self._squares / max(self._tokens, 1)


def _divergences(model: LayeredModel, clean: Stream, noisy: dict[str, Stream]) -> dict[str, float]:
    """Mean KL divergence from the clean model's output, nats a token, of each stream."""
    names = list(noisy)
    total = dict.fromkeys(names, 0.0)
    for batch, tokens in enumerate(clean.tokens):
        rows = [stream.hidden[batch] for stream in (clean, *noisy.values())]
        joint = Stream([tokens] * len(rows), rows, clean.arguments)
        outputs = (logits.log_softmax(-1) for logits in model.logits(joint))
        reference = next(outputs)
        for name, log_probabilities in zip(names, outputs, strict=True):
            total[name] += float((reference.exp() * (reference - log_probabilities)).sum())
    count = sum(tokens.numel() for tokens in clean.tokens)
    return {name: max(value / count, 0.0) for name, value in total.items()}
