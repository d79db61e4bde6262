"""`moqc compile`: from a checkpoint to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import (
    Activations,
    Cache,
    Calibration,
    CalibrationTokens,
    Context,
    DumpIr,
    Formats,
    Linears,
    MaxBatch,
    ModelArgument,
    PipelineText,
    PrintAfter,
    Quiet,
    Seed,
    StopAfter,
    TargetName,
    TimePasses,
    VerifyEach,
    pipeline_text,
    split,
)
from moqc.commands.units import parse_share

_RENAMED = {"calib": "calibration", "calib_tokens": "calibration_tokens"}
"""Option -> its key in a recipe."""


def effective_options(ctx: typer.Context, file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """`given`, or where there is a recipe, its options with those over it that stand on the command line."""
    named = {_RENAMED.get(name, name): value for name, value in given.items()}
    if file is None:
        return named
    from moqc.recipe import read_recipe

    sources = {name: ctx.get_parameter_source(name) for name in given}
    typed = {
        _RENAMED.get(name, name)
        for name, source in sources.items()
        if source is not None and source.name == "COMMANDLINE"
    }
    return read_recipe(file).options() | {name: value for name, value in named.items() if name in typed}


def command(
    ctx: typer.Context,
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Artifact folder to write.")
    ] = None,
    bits: Annotated[
        float, typer.Option(metavar="N", help="Expert file bits per weight, scales and all.")
    ] = 3.0,
    model_bits: Annotated[
        float | None,
        typer.Option(
            "--model-bits", metavar="N", help="File bits per weight of the whole model, instead of --bits."
        ),
    ] = None,
    formats: Formats = "integer",
    linears: Linears = "int8-g64-sym",
    allocator: Annotated[
        str, typer.Option(metavar="NAME", help="Who decides on bits; see `moqc allocators`.")
    ] = "global",
    quantizer: Annotated[
        str, typer.Option(metavar="NAME", help="How experts are rounded: gptq or rtn.")
    ] = "gptq",
    activations: Activations = None,
    target: TargetName = "native",
    calib: Calibration = None,
    calib_tokens: CalibrationTokens = 32_768,
    context: Context = None,
    max_batch: MaxBatch = 4,
    prune: Annotated[
        str | None,
        typer.Option("--prune", metavar="SHARE", help="Skip this share of the experts' work, such as 15%."),
    ] = None,
    prune_loss: Annotated[
        float | None,
        typer.Option("--prune-loss", metavar="NATS", help="Skip what raises the loss by at most this."),
    ] = None,
    prune_rule: Annotated[
        str,
        typer.Option("--prune-rule", metavar="RULE", help="What to skip: mass, odp or topk-threshold."),
    ] = "mass",
    cold_expert_policy: Annotated[
        str,
        typer.Option(
            "--cold-expert-policy",
            metavar="POLICY",
            help="Experts that no calibration token keeps: keep, demote to the smallest format, or remove.",
        ),
    ] = "keep",
    cache: Cache = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an existing artifact.")] = False,
    seed: Seed = 0,
    dump_ir: DumpIr = None,
    print_after: PrintAfter = "",
    time_passes: TimePasses = False,
    verify_each: VerifyEach = False,
    stop_after: StopAfter = None,
    start_from: Annotated[
        Path | None,
        typer.Option("--start-from", metavar="FILE", help="Continue from an IR file of --dump-ir."),
    ] = None,
    pipeline: PipelineText = None,
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="YAML file of these options; see `moqc recipe`."),
    ] = None,
    quiet: Quiet = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Progress and notes on stderr as one JSON object a line.")
    ] = False,
) -> None:
    """Compile a checkpoint into an artifact."""
    from moqc.api import compile
    from moqc.pipelines import Debug

    if log_json:
        log.use_json()
    if quiet:
        log.be_quiet()
    options = {
        "bits": bits,
        "model_bits": model_bits,
        "formats": formats,
        "linears": linears,
        "allocator": allocator,
        "quantizer": quantizer,
        "activations": activations,
        "target": target,
        "calib": calib,
        "calib_tokens": calib_tokens,
        "context": context,
        "max_batch": max_batch,
        "prune": None if prune is None else parse_share(prune),
        "prune_loss": prune_loss,
        "prune_rule": prune_rule,
        "cold_expert_policy": cold_expert_policy,
        "seed": seed,
        "pipeline": pipeline_text(pipeline),
    }
    manifest = compile(
        model,
        output,
        **effective_options(ctx, recipe, options),
        cache=cache,
        force=force,
        start_from=start_from,
        debug=Debug(
            dump_ir=dump_ir,
            print_after=split(print_after),
            time_passes=time_passes,
            verify_each=verify_each,
            stop_after=stop_after,
        ),
    )
    if isinstance(manifest, str):  # the IR after --stop-after
        typer.echo(manifest, nl=False)
    else:
        sizes = manifest.sizes
        log.logger.info(
            "%s: %s bytes, experts %.3f and model %.3f file bits per weight",
            output,
            f"{sizes.artifact_bytes:,}",
            sizes.expert_file_bits_per_weight,
            sizes.model_file_bits_per_weight,
        )
