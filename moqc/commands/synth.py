"""`moqc synth`: random models of real sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import Quiet, note_sizes, options
from moqc.errors import UserError
from moqc.options import SynthOptions


@options(choices=SynthOptions)
def command(
    config: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="A config.json, its folder, or a name such as qwen3-30b-a3b."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write.")],
    choices: dict[str, Any],
    packed: Annotated[
        bool, typer.Option("--packed", help="Write an artifact of random packed weights, not a checkpoint.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write a random model of a real size, to measure speed. A checkpoint, or with --packed an artifact."""
    from moqc.inputs import require_compiler

    if quiet:
        log.be_quiet()
    require_compiler()
    from moqc.synthesis import synthesize_artifact, synthesize_checkpoint

    if not packed:
        others = set(choices) - {"layers", "seed"}
        if others:
            raise UserError(f"{min(others)}: goes with --packed only; a checkpoint has layers and a seed")
        synthesize_checkpoint(config, output, **{"layers": None, "seed": 0, **choices})
        return
    manifest = synthesize_artifact(config, output, **choices)
    note_sizes(output, manifest)
