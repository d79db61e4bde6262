"""Options that several commands share, and how they print. Imports neither TVM nor torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moqc.errors import UserError
from moqc.targets import TARGETS

ArtifactArgument = Annotated[Path, typer.Argument(metavar="ARTIFACT", help="Folder that moqc compile wrote.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, or an id of the Hugging Face hub.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes, only warnings.")]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", metavar="DIR", help="Folder for intermediate results. [default: ~/.cache/moqc]"),
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option("--calib", metavar="FILE", help="Calibration text; repeatable. [default: built-in text]"),
]
CalibrationTokens = Annotated[
    int, typer.Option("--calib-tokens", metavar="N", help="Calibration tokens, all files together.")
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", help="For what is drawn at random.")]
TargetName = Annotated[
    str,
    typer.Option(
        "--target",
        metavar="NAME",
        help="Machine to compile for; see `moqc targets`.",
        autocompletion=lambda: ["native", *TARGETS],
    ),
]
Formats = Annotated[
    str,
    typer.Option(
        "--formats", metavar="NAMES", help="To choose from: integer, trellis, or formats separated by commas."
    ),
]
Linears = Annotated[
    str,
    typer.Option("--linears", metavar="FORMAT", help="Format of the other matrices, or none: as they are."),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        metavar="MODE",
        help="int8: kernels quantize the inputs of quantized matrices; float: exact on CPUs, float16 on "
        "GPUs. [default: int8 on CPUs, float on GPUs]",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context", metavar="N", help="Tokens a sequence may have. [default: the model's, at most 4096]"
    ),
]
MaxBatch = Annotated[int, typer.Option("--max-batch", metavar="N", help="Sequences at once.")]
Text = Annotated[list[Path], typer.Option("--text", metavar="FILE", help="Text to score, UTF-8; repeatable.")]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help="Score the first N tokens of each file. [default: all]"),
]
Window = Annotated[int, typer.Option("--window", metavar="N", help="Tokens of context a prediction may see.")]
DumpIr = Annotated[
    Path | None, typer.Option("--dump-ir", metavar="DIR", help="Write the IR after each pass there.")
]
PrintAfter = Annotated[
    str, typer.Option("--print-after", metavar="PASS,...", help="Print the IR after these passes to stderr.")
]
TimePasses = Annotated[bool, typer.Option("--time-passes", help="Print the seconds of each pass to stderr.")]
VerifyEach = Annotated[bool, typer.Option("--verify-each", help="Check the IR after each pass.")]
StopAfter = Annotated[
    str | None, typer.Option("--stop-after", metavar="PASS", help="Print the IR after this pass and end.")
]
PipelineText = Annotated[
    str | None,
    typer.Option("--pipeline", metavar="TEXT", help="Passes to run, or @FILE; see `moqc passes`."),
]


def split(value: str) -> tuple[str, ...]:
    """Items of a comma-separated list; UserError when one is empty."""
    items = tuple(item.strip() for item in value.split(",")) if value.strip() else ()
    if not all(items):
        raise UserError(f"{value!r}: an item of the list is empty")
    return items


def split_numbers(value: str) -> tuple[float, ...]:
    """Numbers of a comma-separated list."""
    try:
        return tuple(float(item) for item in split(value))
    except ValueError as error:
        raise UserError(f"{value!r}: expected numbers separated by commas, such as 2.5,3.25") from error


def split_integers(value: str) -> tuple[int, ...]:
    """Integers of a comma-separated list."""
    try:
        return tuple(int(item) for item in split(value))
    except ValueError as error:
        raise UserError(f"{value!r}: expected integers separated by commas, such as 0,1,2") from error


def pipeline_text(value: str | None) -> str | None:
    """The text of ``--pipeline``: itself, or the content of the file after an ``@``."""
    if value is None or not value.startswith("@"):
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{value[1:]}: cannot read the pipeline ({error})") from error


def print_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


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
