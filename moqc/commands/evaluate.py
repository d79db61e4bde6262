"""`moqc eval`: score an artifact on text."""

from __future__ import annotations

from typing import Annotated

import typer

from moqc import log
from moqc.commands.options import (
    ArtifactArgument,
    Json,
    Quiet,
    Text,
    Tokens,
    print_json,
    print_table,
)


def command(
    artifact: ArtifactArgument,
    text: Text,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Checkpoint to compare the predictions with.")
    ] = None,
    tokens: Tokens = None,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Tokens of context a prediction may see. [default: 512, or the context]"
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Score an artifact on text: loss, perplexity, and divergence from a reference."""
    from moqc.api import evaluate

    if quiet or as_json:
        log.be_quiet()
    result = evaluate(artifact, text, reference=reference, tokens=tokens, window=window)
    if as_json:
        print_json(result.to_dict())
        return
    header = ("file", "loss", "perplexity", "tokens", "kld_mean", "kld_p99", "top1_agreement")
    rows = [(name, *scores) for name, scores in result.table()]
    print_table(header, rows)
    if reference is None:
        typer.echo("(no --reference: no divergence)")
