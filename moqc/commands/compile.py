"""`moqc compile`: from a checkpoint to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import ModelArgument, Quiet, note_sizes, options, pipeline_text
from moqc.errors import UserError
from moqc.options import Debug, SeveralOptions


@options(choices=SeveralOptions, debug=Debug)
def command(
    *,
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Artifact folder to write.")
    ] = None,
    choices: dict[str, Any],
    debug: dict[str, Any],
    recipe: Annotated[
        Path | None,
        typer.Option("--recipe", metavar="FILE", help="YAML file of these options; see `moqc recipe`."),
    ] = None,
    quiet: Quiet = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Progress and notes on stderr as one JSON object a line.")
    ] = False,
) -> None:
    """Compile a checkpoint into an artifact. Options on the command line win over those of a recipe."""
    from moqc.api import compile, compile_each
    from moqc.keywords import build
    from moqc.recipe import read_recipe

    if log_json:
        log.use_json()
    if quiet:
        log.be_quiet()
    chosen = ({} if recipe is None else read_recipe(recipe)) | choices
    if chosen.get("pipeline"):
        chosen["pipeline"] = pipeline_text(chosen["pipeline"])
    several = chosen.pop("targets", None)
    if several is not None:
        chosen.pop("target", None)  # a recipe's
        if "target" in choices or debug or output is None:
            raise UserError("--targets wants -o, no --target, and none of the options that show passes")
        for name, manifest in compile_each(model, output, targets=several, **chosen).items():
            note_sizes(output / name, manifest)
        return
    made = compile(model, output, **chosen, debug=build(Debug, debug, "compile"))
    if isinstance(made, str):  # the IR after --stop-after
        typer.echo(made, nl=False)
        return
    note_sizes(output, made)
