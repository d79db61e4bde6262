"""Random models of real sizes, written without a download: checkpoints, and artifacts with packed weights."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from tvm import IRModule

from moqc.assemble import assemble
from moqc.errors import InternalError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.frontend.mapping import stored_tensors
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.synthetic import (
    SyntheticCheckpoint,
    name_seed,
    random_weight,
    read_declared,
    stored_dtype,
    write_metadata,
)
from moqc.inputs import check_architecture, context_length, open_workspace
from moqc.ir.annotations import BITS, LINEAR_BITS
from moqc.ir.packed import packed_names
from moqc.keywords import keywords
from moqc.limits import longest_chunk
from moqc.log import logger, track
from moqc.manifest import Manifest
from moqc.options import Debug, SynthOptions
from moqc.package import check_output, from_torch, staged_folder
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.quantize_experts import bit_classes, routing_table
from moqc.passes.synthesize_weights import SynthesizeWeights, parse_mix
from moqc.pipelines import check_lowering, lowering_pipeline, run_passes
from moqc.quant.draw import random_packed
from moqc.quant.formats import Format
from moqc.quant.layouts import Layout, find_layout
from moqc.targets import find_target
from moqc.tensorfile import create_tensors
from moqc.toolchains import check_toolchain

SHARD_BYTES = 4 << 30
"""Largest weight file of a checkpoint, unless a single tensor is larger."""


def synthesize_checkpoint(config: str | Path, out: Path, *, layers: int | None, seed: int) -> None:
    """Write a checkpoint of random weights for `config` to the new folder `out`, one tensor at a time.

    Tensors have the names, shapes and dtype of the model's checkpoints on the hub. `layers` keeps the first
    so many layers only. Raises ModelError for a configuration that cannot be read, UserError when `out`
    cannot be written.
    """
    declared = read_declared(config, layers)
    with staged_folder(out, force=False) as folder:
        parsed = write_metadata(folder, declared, str(config))
        width = stored_dtype(parsed).itemsize
        shapes = {name: tuple(t.shape) for name, t in stored_tensors(build_skeleton(parsed)).items()}
        sizes = {name: math.prod(shape) * width for name, shape in shapes.items()}
        where = dict(_files(sizes))
        names = track(where, "writing weights")
        for file in dict.fromkeys(where.values()):
            shard = [name for name in where if where[name] == file]
            with create_tensors(folder / file, shard) as writer:
                for name, _ in zip(shard, names, strict=False):
                    writer.add(name, from_torch(random_weight(name, shapes[name], parsed, seed)))
        if len(set(where.values())) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _files(sizes: dict[str, int]) -> Iterator[tuple[str, str]]:
    """(tensor, its file): tensors in order, files of at most `SHARD_BYTES`."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    for number, shard in enumerate(shards, 1):
        part = f"-{number:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        yield from ((name, f"model{part}.safetensors") for name in shard)


@keywords(SynthOptions)
def synthesize_artifact(config: str | Path, out: Path, options: SynthOptions) -> Manifest:
    """Compile `config` into the artifact folder `out` with random packed weights; returns its manifest.

    `experts` are formats with shares as `moqc.passes.synthesize_weights` takes them. Nothing is quantized:
    codes, scales and zeros are drawn one tensor at a time while the files are written.
    """
    check_output(out, force=options.force)
    machine, declared = find_target(options.target), read_declared(config, options.layers)
    activations, experts = machine.mode(options.activations), tuple(options.experts)
    kept = machine.kv_cache(options.kv_cache, activations)
    check_toolchain(machine)
    check_lowering(options.linears, activations, options.max_batch)
    parse_mix(experts)
    workspace, seed = open_workspace(options.cache), options.seed
    with tempfile.TemporaryDirectory(prefix="moqc-") as folder:
        parsed = write_metadata(Path(folder), declared, str(config))
        checkpoint = SyntheticCheckpoint(Path(folder), parsed, str(config), seed)
        length = context_length(parsed, options.context)
        chunk = longest_chunk(parsed, machine, length, options.max_batch)
        check_architecture(checkpoint, workspace, machine)
        ctx = PassContext(machine, checkpoint, workspace=workspace, seed=seed)
        lowering = lowering_pipeline(length, options.max_batch, kept, narrow=machine.launched)
        passes = Pipeline(
            (
                SynthesizeWeights(experts=experts, linears=options.linears, activations=activations),
                *lowering.passes,
            )
        )
        logger.info("importing %s (%s)", config, parsed.model_type)
        latent = machine.latent_attention
        mod = import_model(checkpoint, max_batch=options.max_batch, max_chunk=chunk, latent=latent)
        mod = run_passes(passes, mod, ctx, Debug())
        ctx = PassContext(
            machine,
            checkpoint,
            workspace=workspace,
            params=RandomParams(mod, checkpoint, find_layout(ctx.layout), seed),
        )
        return assemble(mod, ctx, passes, chunk, out, force=options.force)


class RandomParams:
    """The packed weights of a synthetic module, drawn when they are asked for."""

    def __init__(self, mod: IRModule, checkpoint: Checkpoint, layout: Layout, seed: int) -> None:
        """Shapes are those of the experts and linears of `checkpoint`, formats those annotated on `mod`."""
        self._layout, self._seed = layout, seed
        self._draw: dict[str, Callable[[int], NDArray[Any]]] = {}
        self._tables: dict[str, NDArray[Any]] = {}
        plan = BITS.of(mod)
        for block in checkpoint.layouts:
            classes = {name: bit_classes(plan[block.site][name]) for name in block.projections}
            self._tables[f"{block.site}.table"] = routing_table(classes, block.experts)
            for projection, members in classes.items():
                for number, (format, chosen) in enumerate(members.items()):
                    shape = block.shape(projection)[1:]
                    self._add(f"{block.site}.{projection}.{number}", format, (len(chosen), *shape))
        for site, name in LINEAR_BITS.of(mod).items():
            self._add(site, Format.parse(name), checkpoint.shape(f"{site}.weight"))

    def _add(self, prefix: str, format: Format, shape: tuple[int, ...]) -> None:
        for part in packed_names(format):
            self._draw[f"{prefix}.{part}"] = partial(random_packed, self._layout, format, shape, part)

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Nothing is stored here."""
        raise InternalError(f"{name}: a synthetic artifact has no place for weights")

    def get(self, name: str) -> NDArray[Any]:
        """The array called `name`; the same at every call."""
        return self._tables[name] if name in self._tables else self._draw[name](name_seed(name, self._seed))

    def __contains__(self, name: object) -> bool:
        return name in self._draw or name in self._tables
