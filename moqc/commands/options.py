"""Options that several commands share, and how they print. Imports neither TVM nor torch."""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from moqc import log
from moqc.errors import UserError, reason
from moqc.keywords import flags, spellings

if TYPE_CHECKING:
    from moqc.manifest import Manifest

ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that moqc compile wrote.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or an id of the Hugging Face hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")]
Csv = Annotated[bool, typer.Option("--csv", help="Print comma-separated values.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes, only warnings.")]
Text = Annotated[list[Path], typer.Option("--text", metavar="FILE", help="Text to score, UTF-8; repeatable.")]


def options(**lists: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: parameters of a command, named as in `lists`, are replaced by the options of these.

    The command gets a dict of the values that stand on the command line, under the names of the list's
    fields; their types are checked by `moqc.keywords.build`.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        parameters = [inspect.Parameter("ctx", _KEYWORD, annotation=typer.Context)]
        for parameter in inspect.signature(function, eval_str=True).parameters.values():
            cls = lists.get(parameter.name)
            parameters += [parameter.replace(kind=_KEYWORD)] if cls is None else _parameters(cls)
        names = {home: [item.name for item in _parameters(cls)] for home, cls in lists.items()}

        @functools.wraps(function)
        def run(ctx: typer.Context, **values: Any) -> None:
            for home, known in names.items():
                found = {name: values.pop(name) for name in known}
                values[home] = {name: value for name, value in found.items() if _typed(ctx, name)}
            function(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {}
        return run

    return decorate


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _typed(ctx: typer.Context, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _parameters(cls: type[Any]) -> list[inspect.Parameter]:
    """The options of a list as typer wants them."""
    hints, found = get_type_hints(cls), []
    for name, spelling in spellings(cls).items():
        default, kind = getattr(cls, name), hints[name]
        many = isinstance(default, tuple)
        if many:
            default, kind = None, str | None if spelling.joined else list[str] | None
        elif spelling.parse is not None or kind not in _PLAIN:
            default, kind = None, str | None
        info = typer.Option(
            *flags(name, spelling),
            metavar=spelling.metavar,
            help=sentence(spelling.help),
            autocompletion=spelling.complete,
        )
        found.append(inspect.Parameter(name, _KEYWORD, default=default, annotation=Annotated[kind, info]))
    return found


_PLAIN = (bool, int, float, str, int | None, float | None, str | None)
"""Types that typer reads; everything else is text to it."""


def sentence(text: str) -> str:
    """`text` as the help of an option: a capital letter, a period before what is in brackets at the end."""
    body, bracket, default = text.partition(" [")
    return f"{body[:1].upper()}{body[1:]}.{bracket}{default}"


def pipeline_text(value: str | None) -> str | None:
    """The text of ``--pipeline``: itself, or the content of the file after an ``@``."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{value[1:]}: cannot read the pipeline ({reason(error)})") from error


def note_sizes(output: Path | None, manifest: Manifest) -> None:
    """What was written where, on stderr."""
    sizes = manifest.sizes
    log.logger.info(
        "%s: %s bytes, experts %.3f and model %.3f file bits per weight",
        output,
        f"{sizes.artifact_bytes:,}",
        sizes.expert_file_bits_per_weight,
        sizes.model_file_bits_per_weight,
    )


def print_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def print_rows(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, markdown: bool = False, csv: bool = False
) -> None:
    """Print a table: aligned columns, Markdown, or comma-separated values."""
    if csv:
        import csv as writers

        writers.writer(sys.stdout).writerows([header, *rows])
    elif markdown:
        for cells in (header, ["---"] * len(header), *rows):
            typer.echo("| " + " | ".join(map(_cell, cells)) + " |")
    else:
        print_table(header, rows)


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; numbers to the right. Plain text, so that it can be cut and pasted."""
    texts = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *texts, strict=True)]
    numeric = [bool(texts) and all(_is_number(row[at]) for row in texts) for at in range(len(header))]
    for cells in (list(header), *texts):
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        typer.echo("  ".join(padded).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.lstrip("+-").replace(".", "", 1).isdigit()
