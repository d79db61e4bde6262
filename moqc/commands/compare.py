"""`moqc compare`: plans side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moqc import log
from moqc.commands.options import (
    Cache,
    Calibration,
    CalibrationTokens,
    Formats,
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
from moqc.commands.units import parse_share
from moqc.errors import UserError

if TYPE_CHECKING:
    from moqc.evaluate.skips import SkipComparison

RULES = "mass,odp,odp-literal,topk-threshold"
PLANS = (
    "uniform:rtn,uniform:gptq,frequency,block-importance,outlier-score,"
    "ewq,moqa,pmq,pmq:mcmoe,gemq,mxmoe,global"
)


def command(
    model: ModelArgument,
    text: Text,
    bits: Annotated[
        str | None, typer.Option(metavar="N,...", help="Expert file bits per weight. [default: 2.5]")
    ] = None,
    model_bits: Annotated[
        str | None,
        typer.Option("--model-bits", metavar="N,...", help="File bits per weight of the whole model."),
    ] = None,
    allocators: Annotated[
        str | None,
        typer.Option(
            "--allocators",
            metavar="PLAN,...",
            help="Allocator, or allocator:quantizer. [default: all; with --prune: global]",
        ),
    ] = None,
    prune: Annotated[
        str | None,
        typer.Option(
            "--prune", metavar="SHARE", help="Compare rules that skip this share of the experts' work."
        ),
    ] = None,
    prune_rules: Annotated[
        str, typer.Option("--prune-rules", metavar="RULE,...", help="Rules to compare with --prune.")
    ] = RULES,
    formats: Formats = "integer",
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
    from moqc.api import compare, compare_pruning

    if quiet or as_json:
        log.be_quiet()
    if prune is not None:
        if unseen or tasks or problems or as_markdown or len(split_integers(seeds)) != 1:
            raise UserError("with --prune there is text only, one seed, and no Markdown table")
        pruned = compare_pruning(
            model,
            text,
            bits=split_numbers(bits or "2.5"),
            plans=split("global" if allocators is None else allocators),
            prune=parse_share(prune),
            rules=split(prune_rules),
            linears=linears,
            tokens=tokens,
            window=window,
            calibration=calib,
            calibration_tokens=calib_tokens,
            cache=cache,
            seed=split_integers(seeds)[0],
        )
        if as_json:
            print_json(pruned.to_dict())
        else:
            _print_skips(pruned)
        return
    result = compare(
        model,
        text,
        bits=split_numbers(bits or ("" if model_bits else "2.5")),
        model_bits=split_numbers(model_bits or ""),
        plans=split(PLANS if allocators is None else allocators),
        formats=formats,
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


def _print_skips(result: SkipComparison) -> None:
    typer.echo(f"{result.share:.1%} of the experts' work to skip, on {result.tokens} predictions\n")
    print_table(
        ("plan", "bits", "rule", "skipped", "loss", "increase", "KLD", "bytes a token"),
        [
            (
                row.plan,
                row.target_bits,
                row.rule,
                row.skipped_fraction,
                row.loss,
                row.loss_increase,
                row.kld,
                row.active_bytes_per_token,
            )
            for row in result.rows
        ],
    )
