"""`moqc recipe`: the choices of a compilation as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moqc.commands.options import Json, print_json


def command(
    artifact: Annotated[
        Path | None,
        typer.Argument(metavar="ARTIFACT", help="Print what it was made by. [default: the defaults]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Print the options of a compilation as YAML. The defaults, or an artifact's; for `compile --recipe`."""
    from moqc.api import recipe

    found = recipe(artifact)
    if as_json:
        print_json(found.plain())
    else:
        typer.echo(found.to_yaml(), nl=False)
