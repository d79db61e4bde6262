"""`moqc models`: which architectures are supported, as the gate found."""

from __future__ import annotations

from typing import Any

import typer

from moqc.commands.options import Json, options, print_json, print_table
from moqc.options import ModelsOptions


@options(choices=ModelsOptions)
def command(
    choices: dict[str, Any],
    as_json: Json = False,
) -> None:
    """List the architectures, and what the gate says of each. All of transformers' decoders with experts."""
    from moqc.api import models

    survey = models(**choices)
    if as_json:
        print_json(survey)
        return
    rows = [(row["model_type"], row["status"], row["reason"]) for row in survey["rows"]]
    print_table(("model type", "status", "reason"), rows)
    exact = sum(row["status"] == "exact" for row in survey["rows"])
    typer.echo(f"{exact} of {len(rows)} exact, with transformers {survey['transformers']}")
