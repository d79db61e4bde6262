"""`moqc inspect`: show what is in an artifact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from moqc.commands.options import ArtifactArgument, Json, print_json, print_table


def command(
    artifact: ArtifactArgument,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as one HTML page there.")
    ] = None,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            "--add",
            metavar="FILE",
            help="What compare, eval, bench or bench-kernels printed with --json; repeatable.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which experts got how many bits, and why. Also target, sizes, calibration."""
    from moqc.api import inspect, read_report, write_report

    if html is not None:
        write_report(artifact, html, add or ())
        typer.echo(f"{html}: written", err=True)
        return
    content = inspect(artifact)
    if as_json:
        print_json(content)
        return
    from rich.console import Console

    from moqc.report.terminal import print_report

    report = read_report(artifact, add or ())  # all is read before anything is printed
    _print(content)
    typer.echo()
    print_report(report, Console(highlight=False))


def _print(content: dict[str, Any]) -> None:
    versions = content["versions"]
    for label, text in (
        ("model", f"{content['model_type']} from {content['source']}"),
        ("target", f"{content['target']}, activations {content['activations']}"),
        ("size", f"{content['artifact_bytes']:,} bytes"),
        ("experts", f"{content['expert_file_bits_per_weight']:.4f} file bits per weight"),
        ("model", f"{content['model_file_bits_per_weight']:.4f} file bits per weight"),
        ("context", f"{content['context']} tokens, batch {content['batch']}"),
        ("built with", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("linears", _histogram(content["linear_bits"].values()) or "not quantized"),
    ):
        typer.echo(f"{label:10}  {text}")
    for name, found in content["numerics"].items():
        typer.echo(f"{'certified':10}  {name}: {_numerics(found)}")
    if content["bits"]:
        typer.echo()
        rows = [
            (site, projection, _histogram(formats))
            for site, projections in content["bits"].items()
            for projection, formats in projections.items()
        ]
        print_table(("experts", "projection", "formats"), rows)


def _numerics(found: dict[str, Any]) -> str:
    error = found["max_relative_error"]
    return f"not run: {found['not_run']}" if error is None else f"relative error at most {error:.1e}"


def _histogram(formats: Any) -> str:
    counts = Counter(formats)
    return ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
