"""`moqc opt`: run passes on IR text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moqc import log
from moqc.commands.options import (
    Cache,
    Calibration,
    CalibrationTokens,
    DumpIr,
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


def command(
    module: Annotated[Path, typer.Argument(metavar="FILE", help="IR text, as --dump-ir writes it.")],
    pipeline: PipelineText = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where the IR goes. [default: stdout]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint, for passes that read weights.")
    ] = None,
    target: TargetName = "native",
    calib: Calibration = None,
    calib_tokens: CalibrationTokens = 32_768,
    cache: Cache = None,
    seed: Seed = 0,
    dump_ir: DumpIr = None,
    print_after: PrintAfter = "",
    time_passes: TimePasses = False,
    verify_each: VerifyEach = False,
    stop_after: StopAfter = None,
    quiet: Quiet = False,
) -> None:
    """Run a pipeline on IR text and print the IR."""
    from moqc.api import opt
    from moqc.pipelines import Debug

    if quiet:
        log.be_quiet()
    text = opt(
        module,
        pipeline_text(pipeline) or "",
        model=model,
        target=target,
        calibration=calib,
        calibration_tokens=calib_tokens,
        cache=cache,
        seed=seed,
        debug=Debug(
            dump_ir=dump_ir,
            print_after=split(print_after),
            time_passes=time_passes,
            verify_each=verify_each,
            stop_after=stop_after,
        ),
    )
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        from moqc.errors import UserError

        raise UserError(f"{output}: cannot write ({error.strerror})") from error
