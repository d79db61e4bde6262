"""What quantizing the matrices outside the experts costs: attention, shared experts, embeddings, output.

Each is rounded to one format, alone, and the model run: the KL divergence of its output is the cost, with no
estimate between. All of them take one pass over the weights, as a stream of activations each that forks off
where its matrix is. The costs in other formats follow from the errors of the weights:

    cost(f) = KL(probe) * ||W - Q_f(W)||^2 / ||W - Q_probe(W)||^2
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.stream import Stream
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import track
from moqc.quant.device import compute_device
from moqc.quant.formats import Format
from moqc.quant.rtn import quantize_rtn
from moqc.quant.versions import QUANTIZER_VERSIONS

VERSION = 1
"""Of what is measured here; part of the cache keys."""
SLICE = 4096
"""Rows rounded at a time: a whole vocabulary and its candidates need gigabytes."""


def measure_linears(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    workspace: Workspace,
    sites: Sequence[str],
    formats: Sequence[Format],
    *,
    probe: Format,
    tokens: int = 2048,
) -> dict[str, dict[str, float]]:
    """Costs in nats a token of each linear or embedding table of `sites`: site -> format -> KL divergence.

    A matrix that is used twice (tied embeddings) is rounded in both places.
    """
    calibration = calibration.head(tokens)
    versions = [VERSION, QUANTIZER_VERSIONS["rtn"]]
    names = [[str(fmt) for fmt in formats], str(probe), list(sites)]
    key = digest("linears", versions, checkpoint.fingerprint, calibration.fingerprint, names)
    if not workspace.has(key):
        divergence = _divergences(checkpoint, Batches.of(calibration).tokens, sites, probe)
        found = {}
        for site in track(list(sites), "rounding linears"):
            errors = {fmt: _error(checkpoint, site, fmt) for fmt in {*formats, probe}}
            scale = divergence[site] / max(errors[probe], 1e-300)
            found[site] = {str(fmt): scale * errors[fmt] for fmt in formats}
        workspace.save_json(key, found)
    result: dict[str, dict[str, float]] = workspace.load_json(key)
    return result


def _rounded(weight: Tensor, fmt: Format) -> Tensor:
    parts = [quantize_rtn(rows, fmt).dequantize() for rows in torch.split(weight, SLICE)]
    return torch.cat(parts)


def _weight(checkpoint: Checkpoint, site: str) -> Tensor:
    return checkpoint.load(f"{site}.weight").float().to(compute_device())


def _error(checkpoint: Checkpoint, site: str, fmt: Format) -> float:
    weight = _weight(checkpoint, site)
    return float((_rounded(weight, fmt) - weight).double().square().sum())


def _divergences(
    checkpoint: Checkpoint, batches: list[Tensor], sites: Sequence[str], probe: Format
) -> dict[str, float]:
    """Mean KL divergence from the clean model's output, nats a token, with one matrix rounded at a time."""
    model = LayeredModel(checkpoint)
    clean = model.start(batches)
    inner = {site for index in range(model.layer_count) for site in sites if model.owns(index, site)}
    # Matrices outside the layers: a model each, which runs the first and the last step of its stream.
    outer = {site: _with_rounded(checkpoint, site, probe) for site in sites if site not in inner}
    streams: dict[str, Stream] = {site: variant.start(batches) for site, variant in outer.items()}
    for index in track(range(model.layer_count), "measuring linears"):
        original = model.original_experts(index)
        with model.layer(index) as layer:
            for stream in streams.values():
                layer.run(stream, original)
            for site in sites:
                if model.owns(index, site):
                    streams[site] = clean.fork()
                    with layer.replaced(site, _rounded(_weight(checkpoint, site), probe)):
                        layer.run(streams[site], original)
            layer.run(clean, original)
    totals = dict.fromkeys(sites, 0.0)
    for batch, tokens in enumerate(clean.tokens):
        names = [site for site in sites if site in inner]
        rows = [stream.hidden[batch] for stream in (clean, *(streams[site] for site in names))]
        outputs = model.logits(Stream([tokens] * len(rows), rows, clean.arguments))
        reference = next(outputs)
        for site, logits in zip(names, outputs, strict=True):
            totals[site] += _divergence(reference, logits)
        for site, variant in outer.items():
            alone = Stream([tokens], [streams[site].hidden[batch]], clean.arguments)
            totals[site] += sum(_divergence(reference, logits) for logits in variant.logits(alone))
    count = sum(tokens.numel() for tokens in clean.tokens)
    return {site: max(total / count, 0.0) for site, total in totals.items()}


def _with_rounded(checkpoint: Checkpoint, site: str, probe: Format) -> LayeredModel:
    rounded = _rounded(_weight(checkpoint, site), probe)
    names = {f"{site}.weight"}
    names |= {tied for tied, stored in checkpoint.tied.items() if stored in names}

    def override(name: str) -> Tensor | None:
        return rounded if name in names else None

    return LayeredModel(checkpoint, override=override)


def _divergence(reference: Tensor, logits: Tensor) -> float:
    """Summed KL divergence of logits [n, window, vocabulary] from the reference's, in float64."""
    total = 0.0
    for expected, found in zip(reference, logits, strict=True):
        log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total
