"""`moqc compare`: plans side by side."""

from __future__ import annotations

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
    Seed,
    Text,
    Tokens,
    Window,
    print_json,
    print_table,
    split,
    split_numbers,
)

PLANS = "uniform:rtn,uniform:gptq,frequency,pmq,pmq:mcmoe,global"


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
    calib: Calibration = None,
    calib_tokens: CalibrationTokens = 32_768,
    cache: Cache = None,
    seed: Seed = 0,
    as_json: Json = False,
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
        calibration=calib,
        calibration_tokens=calib_tokens,
        cache=cache,
        seed=seed,
    )
    if as_json:
        print_json(result.to_dict())
        return
    typer.echo(f"unquantized loss {result.reference_loss:.4f} on {result.tokens} predictions\n")
    print_table(
        ("plan", "bits", "expert file bits", "model file bits", "loss", "increase"),
        [
            (
                row.plan,
                row.target_bits,
                row.expert_file_bits_per_weight,
                row.model_file_bits_per_weight,
                row.loss,
                row.loss_increase,
            )
            for row in result.rows
        ],
    )
