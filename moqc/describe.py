"""What a compiled module is, for its manifest."""

from __future__ import annotations

import importlib.metadata
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import tvm
from pydantic import ValidationError
from tvm import IRModule

import moqc
from moqc.calibrate.text import CalibrationSet
from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.shards import read_json
from moqc.ir.annotations import (
    BITS,
    CACHE,
    CHANNELS,
    KERNELS,
    KEYS,
    LINEAR_BITS,
    PARAMS,
    PROTECTION,
    PRUNING,
    SCHEMA,
)
from moqc.ir.sites import weight_names
from moqc.log import event
from moqc.manifest import (
    Activations,
    CacheSpec,
    CalibrationRecord,
    Generation,
    Manifest,
    Parameter,
    SitePruning,
    Sizes,
    Source,
    TargetRecord,
    Versions,
)
from moqc.package import WeightCounts
from moqc.passes.pipeline import Pipeline
from moqc.quant.activations import parse_activation
from moqc.recipe import Recipe
from moqc.targets import Target

ANALYSIS_VERSION = 1
_BUILD = (SCHEMA, PARAMS, CHANNELS, BITS, LINEAR_BITS, CACHE, KERNELS)
_NO_SIZES = Sizes(
    expert_file_bits_per_weight=0, model_file_bits_per_weight=0, parameter_bytes=0, artifact_bytes=0
)


def describe(
    mod: IRModule,
    checkpoint: Checkpoint,
    target: Target,
    pipeline: Pipeline,
    *,
    chunk: int,
    recipe: Recipe | None = None,
    calibration: CalibrationSet | None = None,
) -> Manifest:
    """The manifest of a module that went through `pipeline`, without sizes, files and measurements.

    `chunk` is the largest number of tokens a row may have in one call; `recipe` is what the
    passes were chosen by, `calibration` what they measured on.
    """
    return Manifest(
        source=Source(
            path=checkpoint.origin,
            model_type=checkpoint.config.model_type,
            fingerprint=checkpoint.fingerprint,
        ),
        target=_target(mod, target),
        versions=versions(),
        pipeline=str(pipeline),
        recipe=None if recipe is None else recipe.plain(),
        calibration=None if calibration is None else _calibration(calibration),
        bits=_bits(mod),
        linear_bits=LINEAR_BITS.get(mod) or {},
        pruning={site: _pruning(entry) for site, entry in (PRUNING.get(mod) or {}).items()},
        activations=_activations(mod),
        rotated=_rotated(mod),
        protected=_protected(mod),
        sizes=_NO_SIZES,
        parameters=parameters(mod),
        cache=_cache(mod, chunk),
        vocabulary=checkpoint.config.get_text_config().vocab_size,
        generation=read_generation(checkpoint.path),
        numerics={},
        files={},
    )


def _target(mod: IRModule, target: Target) -> TargetRecord:
    return TargetRecord(
        name=target.name,
        features=tuple(sorted(target.features)),
        architectures=target.architectures,
        plans=_plans(mod),
    )


def _bits(mod: IRModule) -> dict[str, dict[str, tuple[str, ...]]]:
    """BITS with tuples; empty for a module whose experts are not quantized."""
    return {
        site: {projection: tuple(formats) for projection, formats in projections.items()}
        for site, projections in (BITS.get(mod) or {}).items()
    }


def _protected(mod: IRModule) -> dict[str, tuple[int, ...]]:
    """Site -> input channels that the added columns of gate and up read."""
    found = PROTECTION.get(mod) or {}
    return {site: tuple(entry["channels"] * entry["copies"]) for site, entry in found.items()}


def _cache(mod: IRModule, chunk: int) -> CacheSpec:
    cache = CACHE.of(mod)
    context = int(cache["context"])
    return CacheSpec(
        context=context,
        batch=int(cache["batch"]),
        chunk=min(chunk, context),
        tensors=tuple(map(tuple, cache["tensors"])),
        dtype=cache["dtype"],
        states=tuple(cache["states"]),
    )


def _plans(mod: IRModule) -> dict[str, int]:
    """`TargetRecord.plans`: of the PrimFuncs that say which of their plans are records of a search.

    Notes kernels that have none.
    """
    count: Counter[str] = Counter()
    for function in mod.functions.values():
        facts = (function.attrs or {}).get("moqc.kernel", {})
        if "recorded" in facts:
            found = [str(source) for source in facts["recorded"].values()]
            count.update([*found, *["rules"] * (len(facts["plans"]) - len(found))])
    if count["rules"]:
        total = sum(count.values())
        event(
            "plans",
            f"{count['rules']} of {total} experts kernels take default plans; `moqc tune` finds others",
            total=total,
            rules=count["rules"],
        )
    return {origin: number for origin, number in count.items() if number}


def _calibration(used: CalibrationSet) -> CalibrationRecord:
    sizes = (array.size for array in used.tokens)
    return CalibrationRecord(datasets=dict(zip(used.names, sizes, strict=True)), fingerprint=used.fingerprint)


def analysis(mod: IRModule, checkpoint: Checkpoint) -> str:
    """The content of ``analysis.json``: shapes of the experts blocks and all that passes measured on them.

    Annotations that say how the module is built are left out; they are in the manifest.
    """
    measured = {key.name: value for key in KEYS.values() if key not in _BUILD and (value := key.get(mod))}
    content = {
        "schema_version": ANALYSIS_VERSION,
        "sites": {
            layout.site: {
                "experts": layout.experts,
                "hidden": layout.hidden,
                "intermediate": layout.intermediate,
                "projections": list(layout.projections),
            }
            for layout in checkpoint.layouts
        },
        "annotations": measured,
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"


def _pruning(entry: dict[str, Any]) -> SitePruning:
    """PRUNING of one site as the manifest has it."""
    rest = {key: value for key, value in entry.items() if key not in ("skipped_ppm", "renormalize")}
    return SitePruning(skipped=entry["skipped_ppm"] / 1e6, renormalize=bool(entry["renormalize"]), **rest)


def _activations(mod: IRModule) -> Activations:
    """What the kernels do with the inputs of quantized matrices: float where all are exact."""
    chosen = [kernel["attributes"].get("activations") for kernel in KERNELS.of(mod)]
    return "int8" if "int8" in chosen else "float"


def _rotated(mod: IRModule) -> bool:
    """Whether kernels rotate what reaches down."""
    names = [kernel["attributes"].get("activation") for kernel in KERNELS.of(mod)]
    return any(parse_activation(name).rotated for name in names if name is not None)


def versions() -> Versions:
    """Versions of everything that shapes the library."""
    version = importlib.metadata.version
    return Versions(
        moqc=moqc.__version__,
        tvm=version("apache-tvm"),
        tvm_ffi=version("apache-tvm-ffi"),
        llvm=str(tvm.get_global_func("target.llvm_version_major")()),
    )


def parameters(mod: IRModule) -> tuple[Parameter, ...]:
    """Weight parameters of main, in order."""
    return tuple(
        Parameter(name=name, shape=tuple(int(extent) for extent in var.ty.shape), dtype=str(var.ty.dtype))
        for var, name in weight_names(mod).items()
    )


def count_weights(mod: IRModule, checkpoint: Checkpoint) -> WeightCounts:
    """Weights of the source model, and which parameters of `mod` belong to routed experts.

    A tied weight counts once. Biases of experts count with the rest of the model.
    """
    prefixes = tuple(f"{layout.site}." for layout in checkpoint.layouts)
    return WeightCounts(
        expert_names=frozenset(
            name for name in PARAMS.of(mod) if name.startswith(prefixes) and not name.endswith("_bias")
        ),
        expert_weights=sum(
            math.prod(layout.shape(projection))
            for layout in checkpoint.layouts
            for projection in layout.projections
        ),
        model_weights=sum(
            math.prod(checkpoint.shape(name)) for name in checkpoint.names if name not in checkpoint.tied
        ),
    )


_DRAWING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50}
"""How transformers draws where `do_sample` is set and the rest is not."""


def read_generation(folder: Path) -> Generation:
    """Token ids and sampling for generation, from generation_config.json or else config.json.

    Raises ModelError when a file is not a JSON object, or holds values that cannot be.
    """
    content: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):  # the second wins
        path = folder / name
        if not path.is_file():
            continue
        content |= {key: value for key, value in read_json(path).items() if value is not None}
    ends = content.get("eos_token_id", [])
    draws = content.get("do_sample") is True
    drawing = {name: content.get(name, usual) for name, usual in _DRAWING.items()} if draws else {}
    try:
        return Generation(
            eos_token_ids=tuple(ends) if isinstance(ends, list) else (ends,),
            bos_token_id=content.get("bos_token_id"),
            pad_token_id=content.get("pad_token_id"),
            **drawing,
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = first["loc"][0]
        what = first["msg"] if where in _DRAWING else "not token ids"
        raise ModelError(f"{folder}: {where} of generation_config.json or config.json: {what}") from error
