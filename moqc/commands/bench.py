"""`moqc bench` and `moqc bench-kernels`: measured speed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moqc import log
from moqc.commands.options import (
    ArtifactArgument,
    Csv,
    Json,
    Markdown,
    Quiet,
    options,
    print_json,
    print_rows,
)
from moqc.options import BenchOptions, KernelOptions


@options(choices=BenchOptions)
def command(
    artifact: ArtifactArgument,
    choices: dict[str, Any],
    as_json: Json = False,
    as_markdown: Markdown = False,
    as_csv: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Time a compiled model: prompts and generation."""
    from moqc.bench.artifact import bench_artifact

    if quiet or as_json:
        log.be_quiet()
    result = bench_artifact(artifact, **choices)
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
    print_rows(header, rows, markdown=as_markdown, csv=as_csv)


@options(choices=KernelOptions)
def kernels(
    shape: Annotated[
        str, typer.Option(metavar="NAME", help="Whose experts block is timed: a known name, or a folder.")
    ],
    choices: dict[str, Any],
    hot: Annotated[
        bool, typer.Option("--hot", help="Use the same weights in every call, from the caches.")
    ] = False,
    as_json: Json = False,
    as_markdown: Markdown = False,
    as_csv: Csv = False,
    quiet: Quiet = False,
) -> None:
    """Time the experts kernels on a known model's layer. Beside plain reads of memory in the same run."""
    from moqc.keywords import build
    from moqc.runtime.tvm_runtime import use_threads

    if quiet or as_json:
        log.be_quiet()
    chosen = build(KernelOptions, choices, "bench-kernels")
    use_threads(chosen.threads)
    from moqc.bench.kernels import bench_kernels

    rows = bench_kernels(chosen.target, shape, chosen.bits, chosen.tokens, cold=not hot)
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
    print_rows(header, table, markdown=as_markdown, csv=as_csv)
