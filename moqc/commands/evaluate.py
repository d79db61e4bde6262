"""`moqc eval`: score an artifact on text."""

from __future__ import annotations

from typing import Any

import typer

from moqc import log
from moqc.commands.options import ArtifactArgument, Json, Quiet, Text, options, print_json, print_table
from moqc.options import EvalOptions


@options(choices=EvalOptions)
def command(
    artifact: ArtifactArgument,
    text: Text,
    choices: dict[str, Any],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score an artifact on text: loss, perplexity, divergence."""
    from moqc.api import evaluate

    if quiet or as_json:
        log.be_quiet()
    result = evaluate(artifact, text, **choices)
    if as_json:
        print_json(result.to_dict())
        return
    header = ("file", "loss", "perplexity", "tokens", "kld_mean", "kld_p99", "top1_agreement")
    rows = [(name, *scores) for name, scores in result.table()]
    print_table(header, rows)
    if "reference" not in choices:
        typer.echo("(no --reference: no divergence)")
