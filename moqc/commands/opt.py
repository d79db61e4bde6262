"""`moqc opt`: run passes on IR text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import Quiet, options, pipeline_text
from moqc.options import Debug, OptOptions


@options(choices=OptOptions, debug=Debug)
def command(
    *,
    module: Annotated[Path, typer.Argument(metavar="FILE", help="IR text, as --dump-ir writes it.")],
    pipeline: Annotated[
        str | None,
        typer.Option("--pipeline", metavar="TEXT", help="Passes to run, or @FILE; see `moqc passes`."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where the IR goes. [default: stdout]"),
    ] = None,
    choices: dict[str, Any],
    debug: dict[str, Any],
    quiet: Quiet = False,
) -> None:
    """Run a pipeline on IR text and print the IR."""
    from moqc.api import opt
    from moqc.keywords import build

    if quiet:
        log.be_quiet()
    text = opt(module, pipeline_text(pipeline) or "", **choices, debug=build(Debug, debug, "opt"))
    if output is None:
        typer.echo(text, nl=False)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        from moqc.errors import UserError

        raise UserError(f"{output}: cannot write ({error.strerror})") from error
