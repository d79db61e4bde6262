"""Compile an ONNX graph: a function of its inputs, with experts in moqc's formats."""

from __future__ import annotations

import dataclasses
import math
import shutil
import tempfile
from pathlib import Path

from tvm import IRModule, relax, tirx

from moqc.certificate import certify
from moqc.codegen import build, export
from moqc.describe import parameters, versions
from moqc.errors import UserError
from moqc.frontend.onnx.importer import OnnxGraph, import_onnx
from moqc.inputs import open_workspace, param_store
from moqc.ir.annotations import BITS, CACHE
from moqc.ir.sites import input_count, weight_names
from moqc.log import logger
from moqc.manifest import (
    LIBRARY,
    Activations,
    CacheSpec,
    Generation,
    GraphInput,
    GraphSpec,
    Manifest,
    Sizes,
    Source,
    TargetRecord,
)
from moqc.options import CompileOptions, Debug
from moqc.package import WeightCounts, check_output, from_torch, write_artifact
from moqc.passes.allocate_bits import AllocateBits
from moqc.passes.base import Params, PassContext
from moqc.passes.pipeline import Pipeline
from moqc.passes.quantize_experts import check_plan, rewrite_experts
from moqc.pipelines import check_bits, check_lowering, run_passes
from moqc.targets import Target, find_target
from moqc.tensorfile import StoredTensor
from moqc.toolchains import check_toolchain

LOWERING = "legalize,schedule"


def compile_graph(path: Path, out: Path, options: CompileOptions) -> Manifest:
    """Compile the ONNX file `path` into the artifact folder `out`; returns its manifest.

    Experts of QMoE nodes keep their codes. Those of MoE nodes are rounded to nearest in one format that fits
    `bits`, for which the plan must be ``uniform:rtn``: an ONNX graph cannot be run on calibration text. With
    a `pipeline` they stay floats, and it takes the place of lowering. Other weights stay as they are.

    Raises UserError for wrong input, before anything is written.
    """
    check_output(out, force=options.force)
    machine, pipeline = find_target(options.target), options.pipeline
    if machine.schedules != "cpu":
        raise UserError(f"target {machine.name}: ONNX graphs are compiled for CPUs only")
    check_toolchain(machine)
    activations = machine.mode(options.activations)
    check_lowering("none", activations, 1)
    graph = import_onnx(path)
    packed = {block.packed for block in graph.blocks.values()}
    if len(packed) > 1:
        raise UserError(f"{path}: has both MoE and QMoE nodes; moqc compiles a graph of one kind")
    mod, text = graph.mod, pipeline or LOWERING
    if packed == {False} and pipeline is None:
        if (options.allocator, options.quantizer) != ("uniform", "rtn"):
            raise UserError(
                f"{path}: its experts are floats, and an ONNX graph cannot be calibrated: give "
                f"--allocator uniform --quantizer rtn, or --pipeline {LOWERING} to leave them as they are"
            )
        check_bits(options.bits)
        allocation = AllocateBits(bits=options.bits, allocator="uniform")
        mod = allocation(mod, PassContext())
        text = f"{Pipeline((allocation,))},{text}"
    workspace = open_workspace(options.cache)
    with param_store(workspace.root, None, None) as params:
        ctx = PassContext(machine, workspace=workspace, params=params)
        if BITS.get(mod):
            check_plan(mod)
            mod = rewrite_experts(mod, dataclasses.replace(graph, mod=mod), params, activations, ctx.layout)
        mod = CACHE.put(mod, {"context": 1, "batch": 1, "tensors": []})
        mod = run_passes(Pipeline.parse(pipeline or LOWERING), mod, ctx, Debug())
        mode: Activations = "int8" if BITS.get(mod) and activations == "int8" else "float"
        draft = _describe(mod, graph, machine, text, mode)
        return _write(mod, graph, params, machine, draft, out, force=options.force)


def _describe(mod: IRModule, graph: OnnxGraph, machine: Target, pipeline: str, mode: Activations) -> Manifest:
    main, model = mod["main"], graph.model
    inputs = tuple(
        GraphInput(name=name, dtype=str(variable.ty.dtype), shape=_sizes(variable))
        for name, variable in zip(graph.inputs, main.params[: input_count(main)], strict=True)
    )
    return Manifest(
        source=Source(path=str(model.path), model_type="onnx", fingerprint=model.fingerprint),
        target=TargetRecord(name=machine.name, features=tuple(sorted(machine.features))),
        versions=versions(),
        pipeline=pipeline,
        bits={
            site: {projection: tuple(formats) for projection, formats in projections.items()}
            for site, projections in (BITS.get(mod) or {}).items()
        },
        linear_bits={},
        activations=mode,
        sizes=Sizes(
            expert_file_bits_per_weight=0, model_file_bits_per_weight=0, parameter_bytes=0, artifact_bytes=0
        ),
        parameters=parameters(mod),
        cache=CacheSpec(context=1, batch=1, chunk=1, tensors=()),
        vocabulary=0,
        generation=Generation(),
        graph=GraphSpec(inputs=inputs, outputs=graph.outputs),
        numerics={},
        files={},
    )


def _sizes(variable: relax.Var) -> tuple[str, ...]:
    """Numbers, or the names of symbolic sizes."""
    return tuple(str(int(n)) if isinstance(n, tirx.IntImm) else str(n) for n in variable.ty.shape)


def _write(
    mod: IRModule,
    graph: OnnxGraph,
    params: Params,
    machine: Target,
    draft: Manifest,
    out: Path,
    *,
    force: bool,
) -> Manifest:
    """Build, certify and package."""
    logger.info("building for %s", machine.name)
    executable = build(mod, machine)

    def load(name: str) -> StoredTensor:
        return StoredTensor.of(params.get(name)) if name in params else from_torch(graph.load(name))

    with tempfile.TemporaryDirectory(prefix="moqc-") as folder:
        library = Path(folder) / LIBRARY
        export(executable, library, machine)

        def place(path: Path) -> None:
            shutil.move(library, path / LIBRARY)

        logger.info("certifying kernels")
        return write_artifact(
            out,
            draft.model_copy(update={"numerics": certify(library, mod, machine, load)}),
            write_code=place,
            load=load,
            counts=_count(mod, graph),
            source=None,
            force=force,
        )


def _count(mod: IRModule, graph: OnnxGraph) -> WeightCounts:
    """Weights of the graph; biases of experts count with the rest."""
    prefixes = tuple(f"{site}." for site in graph.blocks)
    sizes = {
        name: math.prod(int(n) for n in variable.ty.shape) for variable, name in weight_names(mod).items()
    }
    experts = sum(
        math.prod(matrix.shape) for block in graph.blocks.values() for matrix in block.matrices.values()
    )
    others = [name for name in sizes if not name.startswith(prefixes) or name.endswith("_bias")]
    return WeightCounts(
        expert_names=frozenset(sizes) - frozenset(others),
        expert_weights=experts,
        model_weights=experts + sum(sizes[name] for name in others),
    )
