"""`moqc synth`: random models of real sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moqc import log
from moqc.commands.options import (
    Activations,
    Cache,
    Context,
    Linears,
    MaxBatch,
    Quiet,
    Seed,
    TargetName,
    split,
)


def command(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A config.json, its folder, or a name such as qwen3-30b-a3b."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    packed: Annotated[
        bool, typer.Option("--packed", help="Write an artifact of random packed weights, not a checkpoint.")
    ] = False,
    bits: Annotated[
        str,
        typer.Option(
            metavar="FORMAT,...",
            help="With --packed: format of the experts, or several as int2-g64:3,int4-g64:1.",
        ),
    ] = "int3-g64",
    linears: Linears = "int8-g64-sym",
    activations: Activations = None,
    target: TargetName = "native",
    context: Context = None,
    max_batch: MaxBatch = 4,
    layers: Annotated[
        int | None, typer.Option(metavar="N", help="Keep the first N layers only. [default: all]")
    ] = None,
    seed: Seed = 0,
    cache: Cache = None,
    force: Annotated[
        bool, typer.Option("--force", "-f", help="With --packed: replace an existing artifact.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a random checkpoint or artifact from a configuration, to measure speed without a download."""
    from moqc.inputs import require_compiler

    if quiet:
        log.be_quiet()
    require_compiler()
    from moqc.synthesis import synthesize_artifact, synthesize_checkpoint

    if not packed:
        synthesize_checkpoint(config, output, layers=layers, seed=seed)
        return
    manifest = synthesize_artifact(
        config,
        output,
        experts=split(bits),
        linears=linears,
        activations=activations,
        target=target,
        context=context,
        max_batch=max_batch,
        layers=layers,
        seed=seed,
        cache=cache,
        force=force,
    )
    sizes = manifest.sizes
    log.logger.info(
        "%s: %s bytes, experts %.3f and model %.3f file bits per weight",
        output,
        f"{sizes.artifact_bytes:,}",
        sizes.expert_file_bits_per_weight,
        sizes.model_file_bits_per_weight,
    )
