"""What a target cannot do, said before hours of work: missing kernels, buffers that are too large."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

from transformers import PretrainedConfig
from tvm import IRModule

from moqc.errors import BudgetError, TargetError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.experts import ExpertLayout
from moqc.ir.annotations import CACHE
from moqc.passes.allocate_bits import AllocateBits
from moqc.passes.allocation_problem import FORMATS, OWN_FORMATS, TABLE_BITS
from moqc.passes.base import PassContext
from moqc.passes.measure_costs import MeasureCosts
from moqc.passes.pipeline import Pipeline
from moqc.passes.plan_cache import PlanCache
from moqc.pipelines import CANDIDATES, Pruning
from moqc.quant.formats import Format
from moqc.quant.overrides import Override, matches
from moqc.recipe import Recipe
from moqc.schedules.plan_records import read
from moqc.targets import Target, find_target

_FLOAT_BYTES = 4


def check_kernels(target: Target, recipe: Recipe) -> None:
    """Raise TargetError for candidates, passes or records of `recipe` that `target` has no kernels for."""
    if target.records is not None:
        if target.schedules not in ("cpu", "cuda"):
            raise TargetError(
                f"records {target.records}: the kernels of {target.name} have no plans; leave it out"
            )
        found = read(Path(target.records)).target
        if found is not None and find_target(found).schedules != target.schedules:
            raise TargetError(f"records {target.records}: of {found}; target {target.name} has other kernels")
    if not target.launched:
        return
    names = CANDIDATES.get(recipe.formats) or tuple(name.strip() for name in recipe.formats.split(","))
    trellises = [name for name in names if Format.parse(name).trellis]
    if trellises:
        raise TargetError(
            f"formats {trellises[0]}: the kernels of {target.name} read integers; use --formats integer"
        )
    if Pruning.of(recipe) is not None:
        raise TargetError(f"pruned routing has no kernel for target {target.name}: compile without --prune")


def longest_chunk(config: PretrainedConfig, target: Target, length: int, batch: int) -> int:
    """Tokens a row may have in one call on `target`, where the logits of all fit a buffer of it.

    Raises TargetError where not even one does.
    """
    chunk = min(target.chunk_of(batch), length)
    if target.largest_binding is None:
        return chunk
    row = _FLOAT_BYTES * batch * int(config.get_text_config().vocab_size)
    if row > target.largest_binding:
        raise TargetError(
            f"the logits of {batch} sequences take {row:,} bytes, {target.name} binds at most "
            f"{target.largest_binding:,} in one buffer: use a smaller --max-batch"
        )
    return min(chunk, target.largest_binding // row)


def check_bindings(checkpoint: Checkpoint, target: Target, bits: float, linears: str) -> None:
    """Raise TargetError where a parameter would be larger than a buffer that `target` can bind.

    Experts count `bits` bits a weight, other matrices what `linears` stores. Reads headers only.
    """
    for name, size in _sizes(checkpoint, bits, linears):
        _check(name, size, target, "use fewer bits, or a target for a device with larger buffers")


def check_allocation(passes: Pipeline, layouts: Sequence[ExpertLayout]) -> None:
    """What allocate-bits would refuse after all measurements, as far as sizes and names tell.

    Raises BudgetError for bits below the smallest formats, UserError for an override that names nothing.
    """
    measured = [item.formats for item in passes.passes if isinstance(item, MeasureCosts)]
    for item in passes.passes:
        if not isinstance(item, AllocateBits):
            continue
        names = [
            f"{layout.site}.{expert}.{projection}"
            for layout in layouts
            for expert in range(layout.experts)
            for projection in layout.projections
        ]
        for text in item.overrides:
            matches(Override.parse(text), names)
        candidates = item.formats or OWN_FORMATS.get(item.allocator) or (*measured, FORMATS)[0]
        least = _least_bits(layouts, candidates)
        if not item.model_bits and item.bits < least:
            raise BudgetError(
                f"{item.bits:.4g} bits per weight are out of reach: the smallest of these formats take "
                f"{math.ceil(1000 * least) / 1000:.3f}; raise the bits or allow other formats"
            )


def _least_bits(layouts: Sequence[ExpertLayout], candidates: Sequence[str]) -> float:
    """File bits per expert weight with every projection in the smallest of the `candidates`."""
    formats, bits, weights = [Format.parse(name) for name in candidates], 0, 0
    for layout in layouts:
        bits += layout.experts * TABLE_BITS
        for projection in layout.projections:
            experts, rows, columns = layout.shape(projection)
            bits += experts * min(fmt.stored_bits(rows, columns) for fmt in formats)
            weights += experts * rows * columns
    return bits / weights


def check_caches(mod: IRModule, target: Target, context: int, batch: int) -> None:
    """Raise TargetError where a cache of the imported model would be larger than that."""
    if target.largest_binding is None:
        return  # planning takes a pass over the model
    planned = PlanCache(context=context, batch=batch)(mod, PassContext(target=target))
    for shape in CACHE.of(planned)["tensors"]:
        size = _FLOAT_BYTES * prod(shape)  # targets with such a limit have no others
        _check(f"the cache of {batch} sequences of {context} tokens", size, target, "use less of either")


def _check(what: str, size: int, target: Target, advice: str) -> None:
    if target.largest_binding is not None and size > target.largest_binding:
        raise TargetError(
            f"{what}: about {size:,} bytes in one buffer, {target.name} binds at most "
            f"{target.largest_binding:,}; {advice}"
        )


def _sizes(checkpoint: Checkpoint, bits: float, linears: str) -> Iterator[tuple[str, int]]:
    """Name and bytes of what will be one buffer each."""
    for layout in checkpoint.layouts:
        for projection in layout.projections:
            yield f"{layout.site} {projection}", int(prod(layout.shape(projection)) * bits / 8)
    experts = tuple(f"{layout.site}." for layout in checkpoint.layouts)
    for name in checkpoint.names:
        shape = checkpoint.shape(name)
        if name.startswith(experts):
            continue
        if len(shape) == 2 and linears != "none":
            yield name, Format.parse(linears).stored_bits(*shape) // 8
        else:
            yield name, _FLOAT_BYTES * prod(shape)
