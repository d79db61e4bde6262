"""Quantize the experts of a checkpoint by a plan, layer by layer, and run the model that results."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moqc.calibrate.capture import Batches, Captured, Recorder
from moqc.calibrate.experts import ExpertWeights
from moqc.calibrate.layers import LayeredModel, LoadedLayer
from moqc.calibrate.progress import report_site
from moqc.calibrate.statistics import hidden_moments, input_moments, shrink
from moqc.calibrate.store import ExpertStore, ProjectionResult, read_projections, substituted
from moqc.calibrate.stream import Stream, computed
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import Workspace, digest
from moqc.errors import PipelineError
from moqc.frontend.checkpoint import Checkpoint
from moqc.log import logger, track
from moqc.quant.formats import Format
from moqc.quant.mcmoe import quantize_mcmoe
from moqc.quant.protection import Protection
from moqc.quant.quantizers import STORABLE
from moqc.quant.tensor import Quantized
from moqc.quant.versions import QUANTIZER_VERSIONS

VERSION = 2
"""Of the procedure around the quantizers; part of every cache key, as are the versions of the quantizers."""

QUANTIZERS = {
    **{name: quantizer.doc for name, quantizer in STORABLE.items()},
    "mcmoe": "MC-MoE's own procedure, simulated (its zero points are floats)",
}
"""Name -> what it does."""

Plan = Mapping[str, Mapping[str, Sequence[str]]]
"""site -> projection -> format name of each expert."""

SiteResult = dict[str, ProjectionResult]


def quantize_experts(
    checkpoint: Checkpoint,
    plan: Plan,
    quantizer: str,
    calibration: CalibrationSet | None,
    workspace: Workspace,
    *,
    rotate: bool = False,
    protections: Mapping[str, Protection] | None = None,
) -> ExpertStore:
    """Quantize all experts as `plan` says; results come from the workspace where they are there.

    With `rotate`, the inputs of down are rotated (`ExpertWeights.rotated`); gate and up of the sites in
    `protections` get the columns of protected channels.
    `calibration` may be None for quantizers that need no data. Layers go in order: each is quantized for the
    inputs that the already quantized layers give it. A result depends on the plan of its own and the earlier
    sites only, so plans that begin alike share work, and an interrupted run continues where it stopped.
    Raises PipelineError for an unknown quantizer, missing calibration text or a plan that does not fit.
    """
    if quantizer not in QUANTIZERS:
        raise PipelineError(f"unknown quantizer {quantizer!r}: known are {', '.join(QUANTIZERS)}")
    data_free = quantizer in STORABLE and STORABLE[quantizer].data_free
    if not data_free and calibration is None:
        raise PipelineError(f"quantizer {quantizer} needs calibration text; rtn and hqq work without")
    model = LayeredModel(checkpoint)
    _check(plan, model)
    protections = protections or {}
    if protections and quantizer not in STORABLE:
        raise PipelineError(f"quantizer {quantizer} cannot protect channels; {', '.join(STORABLE)} can")
    keys = _keys(model, plan, quantizer, None if data_free else calibration, (rotate, protections))
    store = ExpertStore(keys, workspace, rotate, protections)
    missing = [index for index in range(model.layer_count) if not _cached(model, index, keys, workspace)]
    if missing and (data_free or calibration is None):
        _round_sites(model, plan, quantizer, store)
    elif missing and calibration is not None:
        procedure = _mcmoe_site if quantizer == "mcmoe" else functools.partial(_storable_site, quantizer)
        _calibrated_sites(model, plan, store, calibration, procedure, max(missing))
    return store


def _check(plan: Plan, model: LayeredModel) -> None:
    if set(plan) != set(model.layouts):
        odd = sorted(set(plan) ^ set(model.layouts))
        raise PipelineError(f"the plan and the model differ in their experts blocks: {', '.join(odd[:3])}")
    for site, layout in model.layouts.items():
        for projection in layout.projections:
            formats = plan[site].get(projection, ())
            if len(formats) != layout.experts:
                raise PipelineError(
                    f"{site}: the plan has {len(formats)} formats for {projection}, "
                    f"the block {layout.experts} experts"
                )


def _keys(
    model: LayeredModel,
    plan: Plan,
    quantizer: str,
    calibration: CalibrationSet | None,
    options: tuple[bool, Mapping[str, Protection]],
) -> dict[str, str]:
    source = None if calibration is None else calibration.fingerprint
    versions = [VERSION, QUANTIZER_VERSIONS[quantizer]]
    rotate, protections = options
    extra: list[Any] = ["rotated"] if rotate else []
    extra += [[site, p.copies, *p.channels] for site, p in sorted(protections.items())]
    base = digest("quantized", versions, model.checkpoint.fingerprint, quantizer, source, *extra)
    keys: dict[str, str] = {}
    chain = base
    for index in range(model.layer_count):
        for site in model.sites(index):
            chosen = {projection: list(formats) for projection, formats in plan[site].items()}
            chain = digest(base if calibration is None else chain, site, chosen)
            keys[site] = chain
    return keys


def _cached(model: LayeredModel, index: int, keys: dict[str, str], workspace: Workspace) -> bool:
    return all(workspace.has(keys[site]) for site in model.sites(index))


def _save(workspace: Workspace, key: str, result: SiteResult) -> None:
    tensors: dict[str, Tensor] = {}
    for projection, projection_result in result.items():
        tensors |= projection_result.tensors(projection)
    workspace.save_tensors(key, tensors)


def _round_sites(model: LayeredModel, plan: Plan, quantizer: str, store: ExpertStore) -> None:
    keys, workspace = store.keys, store.workspace
    for site in track(list(keys), "rounding experts"):
        if not workspace.has(keys[site]):
            weights, protection = store.original(model.experts(site)), store.protections.get(site)
            result = {
                name: _by_format(quantizer, weights, name, plan[site][name], None, protection)
                for name in weights.projections
            }
            _save(workspace, keys[site], result)


@dataclass(frozen=True)
class _Site:
    """What a calibrated quantizer gets: a site's weights, its plan, and the inputs it will see."""

    name: str
    weights: ExpertWeights
    formats: Mapping[str, Sequence[str]]
    captured: Captured
    protection: Protection | None = None


def _calibrated_sites(
    model: LayeredModel,
    plan: Plan,
    store: ExpertStore,
    calibration: CalibrationSet,
    procedure: Callable[[_Site], SiteResult],
    last: int,
) -> None:
    keys, workspace = store.keys, store.workspace
    stream = model.start(Batches.of(calibration).tokens)
    for index in track(range(last + 1), "quantizing experts"):
        done: dict[str, ExpertWeights] = {}
        with model.layer(index) as layer:
            for site in model.sites(index):
                weights, protection = store.original(model.experts(site)), store.protections.get(site)
                if not workspace.has(keys[site]):
                    start = time.monotonic()
                    captured = _inputs_of(site, layer, stream, done)
                    with torch.inference_mode():
                        result = procedure(_Site(site, weights, plan[site], captured, protection))
                    _save(workspace, keys[site], result)
                    seconds = time.monotonic() - start
                    changed = substituted(weights, result, protection)
                    report_site(site, weights, changed, captured, seconds)
                found = read_projections(workspace.load_tensors(keys[site]))
                done[site] = substituted(weights, found, protection)
            layer.run(stream, computed(done))


def _inputs_of(site: str, layer: LoadedLayer, stream: Stream, done: dict[str, ExpertWeights]) -> Captured:
    recorder = Recorder(done)
    layer.run(stream, recorder, keep=False)
    return recorder.take(site)


def _storable_site(quantizer: str, site: _Site) -> SiteResult:
    """Gate and up for the inputs of the block, then down for what the quantized gate and up make of them."""
    weights = site.weights
    counts = torch.bincount(site.captured.ids.flatten(), minlength=weights.expert_count)
    hessians = shrink(input_moments(site.captured, weights.expert_count), counts)
    result: SiteResult = {}
    for name in weights.projections[:-1]:
        formats = site.formats[name]
        result[name] = _by_format(quantizer, weights, name, formats, hessians.matrices, site.protection)
    quantized = substituted(weights, result, site.protection)
    before_down = shrink(hidden_moments(site.captured, quantized), counts)
    result["down"] = _by_format(quantizer, weights, "down", site.formats["down"], before_down.matrices)
    starved = sorted({*hessians.starved, *before_down.starved})
    if starved:
        logger.debug("%s: %d starved experts: %s", site.name, len(starved), starved)
    return result


def _by_format(
    quantizer: str,
    weights: ExpertWeights,
    projection: str,
    formats: Sequence[str],
    hessian: Tensor | None,
    protection: Protection | None = None,
) -> ProjectionResult:
    """Quantize one projection, all experts of a format in one batch; not down with a `protection`."""
    protection = None if projection == "down" else protection
    if protection is not None and hessian is not None:
        hessian = protection.moments(hessian)
    classes: dict[Format, tuple[Tensor, Quantized]] = {}
    for name in sorted(set(formats)):
        experts = torch.tensor([expert for expert, chosen in enumerate(formats) if chosen == name])
        fmt, matrices = Format.parse(name), weights.matrices(projection)[experts]
        if protection is not None:
            matrices = protection.split(matrices, fmt)
        chosen = None if hessian is None else hessian[experts]
        classes[fmt] = (experts, STORABLE[quantizer].run(matrices, chosen, fmt))
    return ProjectionResult(classes)


def _mcmoe_site(site: _Site) -> SiteResult:
    """As MC-MoE's code: Hessians without routing weights, all from the block's original weights."""
    weights = site.weights
    of_input = input_moments(site.captured, weights.expert_count, exponent=0)
    of_hidden = hidden_moments(site.captured, weights, exponent=0)
    result: SiteResult = {}
    for name in weights.projections:
        hessian = of_hidden if name == "down" else of_input
        simulated, total = torch.empty_like(weights.matrices(name)), 0
        for bits in sorted({Format.parse(chosen).bits for chosen in site.formats[name]}):
            experts = [e for e, chosen in enumerate(site.formats[name]) if Format.parse(chosen).bits == bits]
            simulated[experts], size = quantize_mcmoe(weights.matrices(name)[experts], hessian[experts], bits)
            total += size
        result[name] = ProjectionResult({}, simulated, total)
    return result
