"""`moqc bench` and `moqc bench-kernels`: measured speed."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import ArtifactArgument, Json, Quiet, TargetName, print_json, print_table, split
from moqc.errors import UserError

Threads = Annotated[int | None, typer.Option("--threads", metavar="N", help="Threads. [default: all cores]")]


class Output(StrEnum):
    """How a table is printed."""

    TABLE = "table"
    MARKDOWN = "md"
    CSV = "csv"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How the table is printed.")]


def command(
    artifact: ArtifactArgument,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="N,...", help="Lengths of prompts to time.")
    ] = "512",
    generate: Annotated[
        str, typer.Option("--generate", "-n", metavar="N,...", help="Numbers of tokens to generate.")
    ] = "128",
    batch: Annotated[int, typer.Option("--batch", metavar="N", help="Sequences at once.")] = 1,
    repetitions: Annotated[int, typer.Option("--repetitions", "-r", metavar="N", help="Times each.")] = 5,
    threads: Threads = None,
    output: OutputOption = Output.TABLE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time a compiled model: prompts and generation, in tokens per second."""
    from moqc.bench.artifact import bench_artifact

    if quiet or as_json:
        log.be_quiet()
    result = bench_artifact(
        artifact,
        prompts=_numbers(prompt),
        generated=_numbers(generate),
        batch=batch,
        repetitions=repetitions,
        threads=threads,
    )
    if as_json:
        print_json(result.to_dict())
        return
    size = f"{result.artifact_bytes / 1e6:.1f} MB"
    header = ("model", "size", "target", "threads", "batch", "test", "tokens/s", "low", "high")
    rows = [
        (
            *(result.model_type, size, result.target, result.threads, row.batch, row.test),
            *(round(value, 1) for value in (row.tokens_per_s, row.low, row.high)),
        )
        for row in result.rows
    ]
    _print(output, header, rows)


def kernels(
    shape: Annotated[str, typer.Option(metavar="NAME", help="Model whose experts block is timed.")],
    bits: Annotated[
        str,
        typer.Option(metavar="B,...", help="Bits, or formats; 4/2/1: experts that take these in turn."),
    ] = "4,3,2,1",
    tokens: Annotated[str, typer.Option(metavar="N,...", help="Tokens a call.")] = "1,32,512",
    target: TargetName = "native",
    hot: Annotated[
        bool, typer.Option("--hot", help="Use the same weights in every call, from the caches.")
    ] = False,
    threads: Threads = None,
    output: OutputOption = Output.TABLE,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time the experts kernels of a target on a known model's layer, beside plain reads of memory."""
    from moqc.runtime.tvm_runtime import use_threads

    if quiet or as_json:
        log.be_quiet()
    use_threads(threads)
    from moqc.bench.kernels import bench_kernels

    rows = bench_kernels(target, shape, split(bits), _numbers(tokens), cold=not hot)
    if as_json:
        print_json([row.to_dict() for row in rows])
        return
    header = ("target", "shape", "bits", "tokens", "weights", "us", "GB/s", "% of reads", "GFLOP/s")
    table = [
        (
            *(row.target, row.shape, row.bits, row.tokens, row.weights, round(row.us, 1)),
            *(round(row.gb_per_s, 2), round(100 * row.gb_per_s / row.read_gb_per_s), round(row.gflops, 1)),
        )
        for row in rows
    ]
    _print(output, header, table)


def _numbers(text: str) -> list[int]:
    """Whole numbers of a comma-separated list."""
    items = split(text)
    if not all(item.isdecimal() for item in items):
        raise UserError(f"{text!r}: expected whole numbers separated by commas, such as 1,32,512")
    return [int(item) for item in items]


def _print(output: Output, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    if output is Output.TABLE:
        print_table(header, rows)
    elif output is Output.CSV:
        csv.writer(sys.stdout).writerows([header, *rows])
    else:
        for cells in (header, ["---"] * len(header), *rows):
            typer.echo("| " + " | ".join(map(str, cells)) + " |")
