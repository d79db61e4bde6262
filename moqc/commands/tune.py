"""`moqc tune`: search the plans of kernels on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import Json, Quiet, options, print_json, print_table
from moqc.options import TuneOptions


@options(choices=TuneOptions)
def command(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="Records; continued if they are there.")
    ],
    choices: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Search faster plans of experts kernels on this machine. For `moqc compile --records`."""
    from moqc.keywords import build
    from moqc.runtime.tvm_runtime import use_threads

    if quiet or as_json:
        log.be_quiet()
    use_threads(build(TuneOptions, choices, "tune").threads)
    from moqc.bench.tune import tune

    rows = tune(output, **choices)
    if as_json:
        print_json(rows)
        return
    names = ("kernel", "tokens", "experts", "hidden", "intermediate", "bits", "plan")
    table = [
        (
            *(row[name] for name in names),
            row["microseconds"],
            f"{row['rule_microseconds'] / row['microseconds']:.2f}",
        )
        for row in rows
    ]
    print_table((*names, "us", "default / us"), table)
