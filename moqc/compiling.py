"""From a checkpoint to an artifact, and passes on IR text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moqc.errors import PipelineError, UserError
from moqc.inputs import (
    check_architecture,
    check_metadata,
    context_length,
    open_workspace,
    param_store,
    read_calibration,
    read_module,
    require_compiler,
    require_onnx,
    resolve_model,
)
from moqc.keywords import keywords
from moqc.log import logger
from moqc.manifest import Manifest, Sizes
from moqc.options import CompileOptions, OptOptions, SeveralOptions
from moqc.package import check_output, share_files
from moqc.targets import Target, find_target

if TYPE_CHECKING:
    from tvm import IRModule

    from moqc.frontend.checkpoint import Checkpoint
    from moqc.passes.base import PassContext
    from moqc.passes.pipeline import Pipeline

PADDED = 1.02
"""Times the bits asked for, from which on padding is worth a warning."""


@keywords(CompileOptions)
def compile(model: str | Path, out: str | Path | None, options: CompileOptions) -> Manifest | str:
    """Compile a checkpoint into the artifact folder `out`; returns its manifest.

    The choices may come from a recipe: ``compile(model, out, **recipe.options())``. With ``debug.stop_after``
    the IR text after that pass is returned, and no artifact is written. A `pipeline` takes the place of the
    default passes: options that only make those do nothing then.

    Args:
        model: a checkpoint folder, or an id of the Hugging Face hub.
        out: the folder to write; may be None with ``debug.stop_after``.

    Raises:
        UserError: for wrong input, before anything is written.

    """
    if out is not None:
        check_output(Path(out), force=options.force)
    elif options.debug.stop_after is None:
        raise UserError("no output folder: give one with -o")
    require_compiler()
    if str(model).endswith(".onnx"):
        require_onnx()
        from moqc.graphs import compile_graph

        return compile_graph(Path(model), Path(out or ""), options)
    machine = find_target(options.target, options.records)
    checkpoint = _checked(model, [machine], options)
    return _compile_checkpoint(checkpoint, None if out is None else Path(out), options, machine)


@keywords(SeveralOptions)
def compile_each(model: str | Path, out: str | Path, options: SeveralOptions) -> dict[str, Manifest]:
    """Compile a checkpoint for several targets; returns the manifest of each by its target's name.

    Every target has an artifact of its own, in a folder of its name under `out`. What does not depend on the
    target is measured and quantized once; files that come out equal, above all the weights of targets with
    one packed layout, are one file on disk.

    Args:
        model: a checkpoint folder, or an id of the Hugging Face hub.
        out: the folder that the artifacts are put in.

    Raises:
        UserError: for wrong input or a target that this machine cannot compile for, before anything is
            written.

    """
    if options.debug.stop_after is not None:
        raise UserError("stop-after shows the IR for one target: give --target")
    machines = {name: find_target(name, options.records) for name in options.targets}
    if not machines or len({machine.name for machine in machines.values()}) < len(options.targets):
        raise UserError(f"targets {','.join(options.targets)}: at least one, and each once")
    for machine in machines.values():
        check_output(Path(out, machine.name), force=options.force)
    require_compiler()
    checkpoint = _checked(model, list(machines.values()), options)
    shard_bytes = min(machine.shard_bytes for machine in machines.values())  # so that files can be equal
    made: dict[str, Manifest] = {}
    for name, machine in machines.items():
        logger.info("target %s", name)
        place, own = Path(out, machine.name), replace(options, target=name)
        alike = replace(machine, shard_bytes=shard_bytes)
        manifest = cast(Manifest, _compile_checkpoint(checkpoint, place, own, alike))
        share_files(Path(out), made, machine.name, manifest)
        made[machine.name] = manifest
    return made


def _checked(model: str | Path, machines: Sequence[Target], options: CompileOptions) -> Checkpoint:
    """Open the model; refuse what cannot be compiled for all `machines`, by options and headers alone."""
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.limits import check_bindings, check_kernels, longest_chunk
    from moqc.pipelines import check_bits, check_lowering, needs_calibration
    from moqc.toolchains import check_toolchain

    for machine in machines:
        check_toolchain(machine)
        check_kernels(machine, options)
        activations = machine.mode(options.activations)
        machine.kv_cache(options.kv_cache, activations)
        check_lowering(options.linears, activations, options.max_batch)
    needs_calibration(options)  # knows the plans there are
    bits = options.bits if options.model_bits is None else options.model_bits
    check_bits(bits)
    checkpoint = Checkpoint.open(resolve_model(model))
    for machine in machines:
        longest_chunk(checkpoint.config, machine, 1, options.max_batch)
        check_bindings(checkpoint, machine, bits, options.linears)
    return checkpoint


def _compile_checkpoint(
    checkpoint: Checkpoint, out: Path | None, options: CompileOptions, machine: Target
) -> Manifest | str:
    from moqc.assemble import assemble
    from moqc.ir.text import print_module
    from moqc.limits import check_allocation, check_caches, longest_chunk
    from moqc.passes.base import PassContext
    from moqc.pipelines import needs_calibration, run_passes

    calibrating = needs_calibration(options)
    length = context_length(checkpoint.config, options.context)
    chunk = longest_chunk(checkpoint.config, machine, length, options.max_batch)
    passes = _passes(options, machine, length)
    if options.start_from is None:
        for item in passes.passes:
            item.check()
        check_allocation(passes, checkpoint.layouts)
    finished = options.debug.stop_after is None
    start = None if options.start_from is None else Path(options.start_from)
    if finished:
        check_metadata(checkpoint)
        if start is None:
            _check_buildable(passes)
    workspace = open_workspace(options.cache)
    texts = None
    if calibrating:
        texts = read_calibration(checkpoint, options.calibration, options.calibration_tokens, options.seed)
    check_architecture(checkpoint, workspace, machine)
    with param_store(workspace.root, options.debug.dump_ir, start) as params:
        ctx = PassContext(machine, checkpoint, texts, workspace, params, options.seed)
        mod, rest = _input_module(ctx, passes, start, options.max_batch, chunk)
        if start is None:
            check_caches(mod, machine, length, options.max_batch)
        mod = run_passes(rest, mod, ctx, options.debug)
        if not finished:
            return print_module(mod)
        recipe = options.recipe()
        manifest = assemble(mod, ctx, passes, chunk, out or Path(), recipe=recipe, force=options.force)
    if options.pipeline is None and start is None:
        warn_of_padding(manifest.sizes, options)
    return manifest


def warn_of_padding(sizes: Sizes, options: CompileOptions) -> None:
    """Say so where the target's packed layout takes clearly more than the bits that were asked for.

    Bits are spent on the formats; a layout pads matrices whose sides are no multiples of its tiles.
    """
    found, asked = sizes.expert_file_bits_per_weight, options.bits
    if options.model_bits is not None:
        found, asked = sizes.model_file_bits_per_weight, options.model_bits
    if found > PADDED * asked:
        logger.warning(
            "%s bits per weight were asked for, the files take %.3f: this model's matrices are padded to "
            "tiles of %s (docs/targets.md)",
            asked,
            found,
            options.target,
        )


def _passes(options: CompileOptions, machine: Target, context: int) -> Pipeline:
    """The pipeline asked for, or the default one. Raises UserError for options that no pass takes."""
    from moqc.passes.pipeline import Pipeline
    from moqc.pipelines import default_pipeline

    if options.pipeline is not None:
        return Pipeline.parse(options.pipeline)
    activations = machine.mode(options.activations)
    return default_pipeline(
        options,
        activations=activations,
        context=context,
        kv_cache=machine.kv_cache(options.kv_cache, activations),
        rotate=machine.rotates,
        narrow=machine.launched,
    )


def _check_buildable(passes: Pipeline) -> None:
    """PipelineError where no pass writes what packaging needs: say so before hours of work."""
    from moqc.ir.annotations import CACHE, KERNELS

    written = {key.name for item in passes.passes for key in item.writes}
    for key in (CACHE, KERNELS):
        if key.name not in written:
            raise PipelineError(
                f"the pipeline has no {key.writer}, without which there is nothing to build: "
                "add it, or stop with --stop-after"
            )


def _input_module(
    ctx: PassContext, passes: Pipeline, start_from: Path | None, max_batch: int, chunk: int
) -> tuple[IRModule, Pipeline]:
    """The module to start with, and the passes that it has not seen yet."""
    from moqc.frontend.hf import import_model

    if start_from is None:
        checkpoint, target = ctx.need("checkpoint", "import"), ctx.need("target", "import")
        logger.info("importing %s (%s)", checkpoint.path, checkpoint.config.model_type)
        latent = target.latent_attention
        return import_model(checkpoint, max_batch=max_batch, max_chunk=chunk, latent=latent), passes
    done = start_from.stem.partition("_")[2]  # 005_allocate-bits.py
    return read_module(start_from), passes.after(done) if done else passes


@keywords(OptOptions)
def opt(module: str | Path, pipeline: str, options: OptOptions) -> str:
    """Run the pipeline on the IR text in the file `module`; the text of the result.

    Packed weights are kept in the folder ``params`` beside the file. Raises UserError as the passes do.

    Args:
        module: IR text, as ``debug.dump_ir`` of `compile` writes it.
        pipeline: the passes to run, as text.

    """
    require_compiler()
    from moqc.calibrate.workspace import ParamStore
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.ir.text import print_module
    from moqc.ir.verify import verify
    from moqc.passes.base import PassContext
    from moqc.passes.pipeline import Pipeline
    from moqc.pipelines import run_passes

    path = Path(module)
    passes = Pipeline.parse(pipeline)
    mod = read_module(path)
    verify(mod)
    checkpoint, texts = None, None
    if options.model is not None:
        checkpoint = Checkpoint.open(resolve_model(options.model))
        texts = read_calibration(checkpoint, options.calibration, options.calibration_tokens, options.seed)
    params = ParamStore(path.absolute().parent / "params")
    ctx = PassContext(
        find_target(options.target), checkpoint, texts, open_workspace(options.cache), params, options.seed
    )
    return print_module(run_passes(passes, mod, ctx, options.debug))
