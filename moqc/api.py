"""moqc as functions: what the commands call. Importing this module loads neither TVM nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moqc.errors import PipelineError, UserError
from moqc.inputs import (
    architecture_gate,
    check_architecture,
    check_metadata,
    context_length,
    open_workspace,
    param_store,
    read_calibration,
    read_module,
    require_compiler,
    require_onnx,
    resolve_config,
    resolve_model,
)
from moqc.log import logger
from moqc.manifest import Manifest, read_manifest
from moqc.package import check_output
from moqc.recipe import Recipe, make_recipe
from moqc.targets import find_target

if TYPE_CHECKING:
    from tvm import IRModule

    from moqc.evaluate.artifact import Evaluation
    from moqc.evaluate.compare import Comparison
    from moqc.evaluate.probes import Probe
    from moqc.evaluate.skips import SkipComparison
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.passes.pipeline import Pipeline
    from moqc.pipelines import Debug
    from moqc.predict.plan import Plan
    from moqc.report.data import Report

_INSPECTED = ("bits", "linear_bits", "pipeline", "versions", "numerics", "quality", "recipe", "calibration")


def compile(
    model: str | Path,
    out: str | Path | None,
    *,
    bits: float = 3.0,
    model_bits: float | None = None,
    formats: str = "integer",
    linears: str = "int8-g64-sym",
    allocator: str = "global",
    quantizer: str = "gptq",
    activations: str | None = None,
    target: str = "native",
    calibration: Sequence[Path | str] | None = None,
    calibration_tokens: int = 32_768,
    context: int | None = None,
    max_batch: int = 4,
    prune: float | None = None,
    prune_loss: float | None = None,
    prune_rule: str = "mass",
    cold_expert_policy: str = "keep",
    cache: Path | str | None = None,
    force: bool = False,
    seed: int = 0,
    pipeline: str | None = None,
    start_from: Path | None = None,
    debug: Debug | None = None,
) -> Manifest | str:
    """Compile a checkpoint into the artifact folder `out`; returns its manifest.

    Options may come from a `moqc.recipe.Recipe`: ``compile(model, out, **recipe.options())``.

    Args:
        model: a checkpoint folder, or an id of the Hugging Face hub.
        out: the folder to write; may be None with ``debug.stop_after``.
        bits: budget of the routed experts in file bits per weight, everything counted.
        model_bits: budget of the whole model instead: embeddings, attention and all are then units of one
            problem with the experts, and `bits` and `linears` do nothing. None: `bits` decides.
        formats: what the allocator chooses from: "integer", "trellis" (smaller loss, slower), or formats
            separated by commas.
        linears: format of the other matrices, or "none".
        allocator: who decides on bits; a name of `moqc allocators`.
        quantizer: how matrices are rounded, "rtn" or "gptq".
        activations: "int8" or "float" inputs of quantized matrices; None: the target's default. "float" is
            exact on CPUs, and rounded to float16 on GPUs.
        target: a name of `moqc.targets`.
        calibration: UTF-8 text files; None takes the built-in text.
        calibration_tokens: how many tokens of it, all files together.
        context: most tokens of a sequence; None: the model's own limit, at most 4096.
        max_batch: most sequences at once.
        prune: share of the routed experts' work that tokens skip, such as 0.15.
        prune_loss: instead of a share, by how many nats the loss on calibration text may rise.
        prune_rule: which experts a token skips, "mass", "odp" or "topk-threshold".
        cold_expert_policy: for experts that no calibration token keeps: "keep", "demote" or "remove".
        cache: folder for intermediate results, by which an interrupted compilation continues.
        force: replace an existing artifact.
        seed: for what is drawn at random.
        pipeline: passes instead of the default ones; options that only make the default ones do nothing then.
        start_from: IR text to continue from, as ``debug.dump_ir`` wrote it.
        debug: what to show of the passes. With `stop_after`, the IR text after that pass is returned, and no
            artifact is written.

    Raises:
        UserError: for wrong input, before anything is written.

    """
    from moqc.pipelines import Debug

    debug = debug or Debug()
    chosen = make_recipe(
        {
            "bits": bits,
            "model_bits": model_bits,
            "formats": formats,
            "linears": linears,
            "allocator": allocator,
            "quantizer": quantizer,
            "activations": activations,
            "target": target,
            "calibration": [str(path) for path in calibration or ()],
            "calibration_tokens": calibration_tokens,
            "context": context,
            "max_batch": max_batch,
            "prune": prune,
            "prune_loss": prune_loss,
            "prune_rule": prune_rule,
            "cold_expert_policy": cold_expert_policy,
            "seed": seed,
            "pipeline": pipeline,
        },
        "compile",
    )
    if out is not None:
        check_output(Path(out), force=force)
    elif debug.stop_after is None:
        raise UserError("no output folder: give one with -o")
    require_compiler()
    if str(model).endswith(".onnx"):
        require_onnx()
        from moqc.graphs import compile_graph

        return compile_graph(
            Path(model),
            Path(out or ""),
            bits=bits,
            plan=f"{allocator}:{quantizer}",
            activations=activations,
            target=target,
            pipeline=pipeline,
            cache=cache,
            force=force,
        )
    from moqc.assemble import assemble
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.frontend.hf import MAX_CHUNK
    from moqc.ir.text import print_module
    from moqc.passes.base import PassContext
    from moqc.passes.pipeline import Pipeline
    from moqc.pipelines import Plan, Pruning, default_pipeline, run_passes
    from moqc.toolchains import check_toolchain

    pruning = Pruning.of(prune, prune_loss, prune_rule, cold_expert_policy)
    machine = find_target(target)
    check_toolchain(machine)
    activations = machine.mode(activations)
    if max_batch < 1:
        raise UserError(f"max-batch {max_batch}: must be at least 1")
    plan = Plan.parse(f"{allocator}:{quantizer}")
    checkpoint = Checkpoint.open(resolve_model(model))
    length = context_length(checkpoint.config, context)
    passes = (
        default_pipeline(
            plan,
            bits=bits,
            linears=linears,
            activations=activations,
            context=length,
            max_batch=max_batch,
            layout=machine.layout,
            pruning=pruning,
            model_bits=model_bits,
            formats=formats,
            rotate=machine.rotates,
        )
        if pipeline is None
        else Pipeline.parse(pipeline)
    )
    if debug.stop_after is None:
        check_metadata(checkpoint)
        if start_from is None:
            _check_buildable(passes)
    workspace = open_workspace(cache)
    calibrating = pipeline is not None or pruning is not None or plan.needs_calibration
    texts = read_calibration(checkpoint, calibration, calibration_tokens, seed) if calibrating else None
    check_architecture(checkpoint, workspace, machine)
    with param_store(workspace.root, debug.dump_ir, start_from) as params:
        ctx = PassContext(machine, checkpoint, texts, workspace, params, seed)
        chunk = min(MAX_CHUNK, length)
        mod, rest = _input_module(checkpoint, passes, start_from, max_batch, chunk)
        mod = run_passes(rest, mod, ctx, debug)
        if debug.stop_after is not None:
            return print_module(mod)
        return assemble(mod, ctx, passes, chunk, Path(out or ""), recipe=chosen, force=force)


def models(*, verify: str | None = None, cache: Path | str | None = None) -> dict[str, Any]:
    """The decoder types with experts and what the gate says about each: the shipped table, or a new one.

    Args:
        verify: a model type to run the gate on now, or "all"; None reads the table that moqc ships.
        cache: folder where passes of the gate are kept.

    Returns:
        ``transformers`` (its version) and ``rows`` of ``model_type``, ``status`` (exact or refused) and
        ``reason``.

    """
    from moqc.frontend import survey

    if verify is None:
        return survey.shipped().dump()
    require_compiler()
    types = survey.decoder_types() if verify == "all" else (verify,)
    gate = architecture_gate(open_workspace(cache), find_target("native"))
    return survey.survey(types, gate).dump()


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
    checkpoint: Checkpoint, passes: Pipeline, start_from: Path | None, max_batch: int, chunk: int
) -> tuple[IRModule, Pipeline]:
    """The module to start with, and the passes that it has not seen yet."""
    from moqc.frontend.hf import import_model

    if start_from is None:
        logger.info("importing %s (%s)", checkpoint.path, checkpoint.config.model_type)
        return import_model(checkpoint, max_batch=max_batch, max_chunk=chunk), passes
    done = start_from.stem.partition("_")[2]  # 003_allocate-bits.py
    return read_module(start_from), passes.after(done) if done else passes


def plan(
    model: str | Path,
    *,
    bits: float | None = None,
    size: int | None = None,
    latency: float | None = None,
    linears: str = "int8-g64-sym",
    allocator: str = "global",
    target: str = "native",
    bandwidth: float | None = None,
    context: int | None = None,
    max_batch: int = 4,
    calibration_tokens: int = 32_768,
) -> Plan:
    """Predict what `compile` would give, from the model's configuration alone: no weights are read.

    Args:
        model: a checkpoint folder, of which config.json is enough, an id of the Hugging Face hub, or a known
            shape's name, such as qwen3-30b-a3b.
        bits: budget in expert file bits per weight,
        size: or in bytes of the artifact,
        latency: or in seconds a decoded token, with an empty cache; give one of the three.
        linears: format of the other matrices, or "none".
        allocator: "uniform" stores all experts in one format; any other name spends the whole budget.
        target: a name of `moqc.targets`, for the speed.
        bandwidth: of the memory in GB/s, where it is not what the target's roofline says.
        context: most tokens of a sequence; None: the model's own limit, at most 4096.
        max_batch: most sequences at once.
        calibration_tokens: for the time that compilation takes.

    Raises:
        UserError: for a model moqc cannot read, or a budget out of reach (BudgetError, with the range).

    """
    from moqc.frontend.trace import outline
    from moqc.package import copied_bytes
    from moqc.predict.plan import Deployment, make_plan
    from moqc.predict.speed import with_bandwidth
    from moqc.quant.allocators.table import find_allocator
    from moqc.quant.formats import Format

    find_allocator(allocator)
    if max_batch < 1:
        raise UserError(f"max-batch {max_batch}: must be at least 1")
    machine = find_target(target)
    config, folder = resolve_config(model)
    deployment = Deployment(
        linears=None if linears == "none" else Format.parse(linears),
        uniform=allocator == "uniform",
        context=context_length(config, context),
        batch=max_batch,
        copied_bytes=copied_bytes(folder),
        machine=with_bandwidth(machine.roofline, bandwidth),
        cache=machine.cache,
    )
    return make_plan(
        outline(config),
        machine.name,
        deployment,
        bits=bits,
        size=size,
        latency=latency,
        calibration_tokens=calibration_tokens,
    )


def opt(
    module: str | Path,
    pipeline: str,
    *,
    model: str | Path | None = None,
    target: str = "native",
    calibration: Sequence[Path | str] | None = None,
    calibration_tokens: int = 32_768,
    cache: Path | str | None = None,
    seed: int = 0,
    debug: Debug | None = None,
) -> str:
    """Run the pipeline on the IR text in the file `module`; the text of the result.

    `model` is needed by passes that read weights. Packed weights are kept in the folder ``params`` beside the
    file. Raises UserError as the passes do.
    """
    require_compiler()
    from moqc.calibrate.workspace import ParamStore
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.ir.text import print_module
    from moqc.ir.verify import verify
    from moqc.passes.base import PassContext
    from moqc.passes.pipeline import Pipeline
    from moqc.pipelines import Debug, run_passes

    path = Path(module)
    passes = Pipeline.parse(pipeline)
    mod = read_module(path)
    verify(mod)
    checkpoint = None if model is None else Checkpoint.open(resolve_model(model))
    texts = (
        None if checkpoint is None else read_calibration(checkpoint, calibration, calibration_tokens, seed)
    )
    params = ParamStore(path.absolute().parent / "params")
    ctx = PassContext(find_target(target), checkpoint, texts, open_workspace(cache), params, seed)
    return print_module(run_passes(passes, mod, ctx, debug or Debug()))


def evaluate(
    artifact: str | Path,
    texts: Sequence[Path | str],
    *,
    reference: str | Path | None = None,
    tokens: int | None = None,
    window: int | None = None,
) -> Evaluation:
    """Score an artifact on text files, through the runtime; see `moqc.evaluate.artifact`."""
    from moqc.evaluate.artifact import evaluate_artifact
    from moqc.runtime.artifact import load

    checkpoint = None
    if reference is not None:
        from moqc.frontend.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(resolve_model(reference))
    return evaluate_artifact(load(artifact), texts, reference=checkpoint, tokens=tokens, window=window)


def compare(
    model: str | Path,
    texts: Sequence[Path | str],
    *,
    bits: Sequence[float] = (),
    model_bits: Sequence[float] = (),
    plans: Sequence[str],
    formats: str = "integer",
    linears: str = "none",
    tokens: int | None = None,
    window: int = 512,
    unseen: Sequence[Path | str] = (),
    tasks: Sequence[Path | str] = (),
    problems: Path | str | None = None,
    questions: int = 100,
    calibration: Sequence[Path | str] | None = None,
    calibration_tokens: int = 32_768,
    cache: Path | str | None = None,
    seeds: Sequence[int] = (0,),
) -> Comparison:
    """Evaluate every plan (``allocator[:quantizer]``) at every budget; see `moqc.evaluate.compare`.

    `bits` are budgets of the routed experts, `model_bits` of the whole model, which only ``global`` can meet.
    `unseen`: text of domains that calibration has not seen, scored apart. `tasks`: files of multiple-choice
    questions, `problems` one of worked problems (`moqc.evaluate.tasks`); `questions` are taken of each.
    `seeds`: calibration windows are drawn once with each.
    """
    require_compiler()
    from moqc.evaluate.bench import Bench
    from moqc.evaluate.compare import Budget, compare_plans
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.passes.base import PassContext
    from moqc.pipelines import Plan

    parsed = [(text, Plan.parse(text)) for text in plans]
    if not parsed or not (bits or model_bits) or not seeds:
        raise UserError("nothing to compare: give at least one plan, one number of bits and one seed")
    if model_bits and any(plan.allocator != "global" for _, plan in parsed):
        raise UserError(
            "only the global allocator can meet model bits: give global[:quantizer] plans, or bits"
        )
    checkpoint = Checkpoint.open(resolve_model(model))
    workspace = open_workspace(cache)
    probes = _probes(checkpoint, texts, unseen, tasks, problems, tokens, window, questions)
    contexts = {
        seed: PassContext(
            checkpoint=checkpoint,
            calibration=read_calibration(checkpoint, calibration, calibration_tokens, seed),
            workspace=workspace,
            seed=seed,
        )
        for seed in seeds
    }
    bench = Bench.open(checkpoint, workspace, probes)
    budgets = [Budget(value) for value in bits] + [Budget(value, whole=True) for value in model_bits]
    return compare_plans(contexts, bench, parsed, budgets, linears=linears, formats=formats)


def compare_pruning(
    model: str | Path,
    texts: Sequence[Path | str],
    *,
    bits: Sequence[float],
    plans: Sequence[str],
    prune: float,
    rules: Sequence[str],
    linears: str = "none",
    tokens: int | None = None,
    window: int = 512,
    calibration: Sequence[Path | str] | None = None,
    calibration_tokens: int = 32_768,
    cache: Path | str | None = None,
    seed: int = 0,
) -> SkipComparison:
    """Evaluate rules that skip `prune` of the experts' work, on every plan; see `moqc.evaluate.skips`."""
    require_compiler()
    from moqc.evaluate.bench import Bench
    from moqc.evaluate.metrics import evaluation_windows
    from moqc.evaluate.skips import check_rules, compare_skips
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.passes.base import PassContext
    from moqc.pipelines import Plan

    check_rules(rules)
    parsed = [(text, Plan.parse(text)) for text in plans]
    checkpoint = Checkpoint.open(resolve_model(model))
    workspace = open_workspace(cache)
    windows = evaluation_windows(texts, checkpoint.path / "tokenizer.json", tokens=tokens, window=window)
    ctx = PassContext(
        checkpoint=checkpoint,
        calibration=read_calibration(checkpoint, calibration, calibration_tokens, seed),
        workspace=workspace,
        seed=seed,
    )
    bench = Bench.open(checkpoint, workspace, {})
    return compare_skips(ctx, bench, windows, parsed, bits, prune, rules, linears=linears)


def _probes(
    checkpoint: Checkpoint,
    texts: Sequence[Path | str],
    unseen: Sequence[Path | str],
    tasks: Sequence[Path | str],
    problems: Path | str | None,
    tokens: int | None,
    window: int,
    questions: int,
) -> dict[str, Probe]:
    from moqc.evaluate.metrics import evaluation_windows
    from moqc.evaluate.probes import ChoiceProbe, ExactProbe, TextProbe
    from moqc.evaluate.tasks import multiple_choice, worked_problems

    if questions < 1:
        raise UserError(f"questions {questions}: ask at least one")
    tokenizer = checkpoint.path / "tokenizer.json"
    found: dict[str, Probe] = {
        "text": TextProbe(evaluation_windows(texts, tokenizer, tokens=tokens, window=window))
    }
    if unseen:
        found["unseen"] = TextProbe(evaluation_windows(unseen, tokenizer, tokens=tokens, window=window))
    if tasks:
        found["choices"] = ChoiceProbe(multiple_choice(tasks, tokenizer, questions))
    if problems is not None:
        found["exact"] = ExactProbe(worked_problems(problems, tokenizer, questions))
    return found


def recipe(artifact: str | Path | None = None) -> Recipe:
    """The recipe an artifact was made by, or the one of the defaults. Reads its manifest only."""
    if artifact is None:
        return Recipe()
    manifest = read_manifest(Path(artifact))
    if manifest.recipe is None:
        raise UserError(f"{artifact}: made by a version of moqc that kept no recipe; compile it again")
    return make_recipe(manifest.recipe, f"{artifact}: moqc.json")


def inspect(artifact: str | Path) -> dict[str, Any]:
    """What an artifact is: target, sizes, bits of every expert and why. Reads two small files of it only."""
    from moqc.report.data import read_report
    from moqc.report.page import cold_rows, uniform_rows, why

    report = read_report(Path(artifact))
    manifest = report.manifest
    content = manifest.model_dump(mode="json")
    return {
        "source": manifest.source.path,
        "model_type": manifest.source.model_type,
        "target": manifest.target.name,
        "activations": manifest.activations,
        "artifact_bytes": manifest.sizes.artifact_bytes,
        "expert_file_bits_per_weight": manifest.sizes.expert_file_bits_per_weight,
        "model_file_bits_per_weight": manifest.sizes.model_file_bits_per_weight,
        "context": manifest.cache.context,
        "batch": manifest.cache.batch,
        **{key: content[key] for key in _INSPECTED},
        "why": why(report),
        "uniform": uniform_rows(report),
        "least_used": cold_rows(report),
    }


def read_report(artifact: str | Path, add: Sequence[Path | str] = ()) -> Report:
    """The report of an artifact, with the JSON results of other commands in the files `add`.

    Raises UserError for a folder that is no artifact, or a file that no command printed.
    """
    from moqc.report import data

    return data.read_report(Path(artifact), dict(data.read_extra(Path(path)) for path in add))


def write_report(artifact: str | Path, path: str | Path, add: Sequence[Path | str] = ()) -> None:
    """Write the report of an artifact as one HTML file that needs nothing else; `add` as in `read_report`."""
    from moqc.report.page import render

    text = render(read_report(artifact, add))
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); give another file") from error
