"""`moqc compare`: plans side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moqc import log
from moqc.commands.options import (
    Cache,
    Calibration,
    CalibrationTokens,
    Json,
    ModelArgument,
    Quiet,
    Text,
    Tokens,
    Window,
    print_json,
    print_table,
    split,
    split_integers,
    split_numbers,
)

PLANS = (
    "uniform:rtn,uniform:gptq,frequency,block-importance,outlier-score,"
    "ewq,moqa,pmq,pmq:mcmoe,gemq,mxmoe,global"
)


def command(
    model: ModelArgument,
    text: Text,
    bits: Annotated[str, typer.Option(metavar="N,...", help="Expert file bits per weight.")] = "2.5",
    allocators: Annotated[
        str, typer.Option("--allocators", metavar="PLAN,...", help="Allocator, or allocator:quantizer.")
    ] = PLANS,
    linears: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format of the other matrices, or none: as they are.")
    ] = "none",
    tokens: Tokens = None,
    window: Window = 512,
    unseen: Annotated[
        list[Path] | None,
        typer.Option("--unseen", metavar="FILE", help="Text of another domain, scored apart; repeatable."),
    ] = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option("--task", metavar="FILE", help="Multiple-choice questions, JSON Lines; repeatable."),
    ] = None,
    problems: Annotated[
        Path | None, typer.Option("--problems", metavar="FILE", help="Worked problems to solve exactly.")
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", help="Questions of each file, and problems.")
    ] = 100,
    calib: Calibration = None,
    calib_tokens: CalibrationTokens = 32_768,
    cache: Cache = None,
    seeds: Annotated[
        str, typer.Option("--seeds", metavar="N,...", help="Draw calibration text once with each.")
    ] = "0",
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate plans side by side: their sizes, and their losses on the same text."""
    from moqc.api import compare

    if quiet or as_json:
        log.be_quiet()
    result = compare(
        model,
        text,
        bits=split_numbers(bits),
        plans=split(allocators),
        linears=linears,
        tokens=tokens,
        window=window,
        unseen=unseen or (),
        tasks=tasks or (),
        problems=problems,
        questions=questions,
        calibration=calib,
        calibration_tokens=calib_tokens,
        cache=cache,
        seeds=split_integers(seeds),
    )
    if as_json:
        print_json(result.to_dict())
        return
    from moqc.evaluate.summary import headline, markdown, table

    if as_markdown:
        typer.echo(markdown(result))
        return
    typer.echo(f"{headline(result)}\n")
    print_table(*table(result))
