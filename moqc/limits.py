"""What a target cannot do, said before hours of work: missing kernels, buffers that are too large."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from transformers import PretrainedConfig
from tvm import IRModule, relax

from moqc.errors import TargetError
from moqc.frontend.hf import MAX_CHUNK
from moqc.ir import ops
from moqc.ir.sites import bindings, weight_names
from moqc.pipelines import CANDIDATES, Pruning
from moqc.quant.formats import Format
from moqc.recipe import Recipe
from moqc.targets import Target

_FLOAT_BYTES = 4


def check_kernels(target: Target, recipe: Recipe) -> None:
    """Raise TargetError for candidates or passes of `recipe` that `target` has no kernels for."""
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
    """Tokens a row may have in one call: as many as the logits of all fit a buffer of `target`.

    Raises TargetError where not even one does.
    """
    chunk = min(MAX_CHUNK, length)
    if target.largest_binding is None:
        return chunk
    row = _FLOAT_BYTES * batch * int(config.get_text_config().vocab_size)
    if row > target.largest_binding:
        raise TargetError(
            f"the logits of {batch} sequences take {row:,} bytes, {target.name} binds at most "
            f"{target.largest_binding:,} in one buffer: use a smaller --max-batch"
        )
    return min(chunk, target.largest_binding // row)


def check_bindings(mod: IRModule, target: Target, bits: float, linears: str) -> None:
    """Raise TargetError where a parameter would be larger than a buffer that `target` can bind.

    `mod` is the imported model; experts count `bits` bits a weight, other matrices what `linears` stores.
    """
    limit = target.largest_binding
    for name, size in _sizes(mod, bits, linears):
        if limit is not None and size > limit:
            raise TargetError(
                f"{name}: about {size:,} bytes in one buffer, {target.name} binds at most {limit:,}; "
                "use fewer bits, or a target for a device with larger buffers"
            )


def _sizes(mod: IRModule, bits: float, linears: str) -> Iterator[tuple[str, int]]:
    """Name and bytes of what will be one buffer each."""
    names, experts = weight_names(mod), set()
    for _, call in bindings(mod["main"]):
        if ops.is_call(call, ops.EXPERTS):
            for projection in ops.PROJECTIONS:
                matrices = ops.operands(call).get(projection)
                if matrices is not None:
                    experts.add(matrices)
                    yield f"{ops.describe(call)} {projection}", int(_elements(matrices) * bits / 8)
    for variable, name in names.items():
        shape = [int(extent) for extent in variable.ty.shape]
        if variable in experts:
            continue
        if len(shape) == 2 and linears != "none":
            yield name, Format.parse(linears).stored_bits(*shape) // 8
        else:
            yield name, _FLOAT_BYTES * prod(shape)


def _elements(tensor: relax.Expr) -> int:
    return prod(int(extent) for extent in tensor.ty.shape)
