"""`moqc plan`: what a compilation would give, before anything is read or run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from moqc.commands.options import (
    CalibrationTokens,
    Json,
    TargetName,
    print_json,
    print_table,
)
from moqc.commands.units import (
    bytes_text,
    count_text,
    parse_bytes,
    parse_seconds,
    seconds_text,
)

if TYPE_CHECKING:
    from moqc.predict.plan import Plan, Prediction


def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint folder, config.json, hub id, or qwen3-30b-a3b etc."),
    ],
    bits: Annotated[
        float | None, typer.Option(metavar="N", help="Expert file bits per weight. [default: 3.0]")
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Size of the artifact at most, such as 6GiB.")
    ] = None,
    latency: Annotated[
        str | None, typer.Option(metavar="TIME", help="Time of a decoded token at most, such as 25ms.")
    ] = None,
    linears: Annotated[
        str, typer.Option(metavar="FORMAT", help="Format of the other matrices, or none: as they are.")
    ] = "int8-g64-sym",
    allocator: Annotated[
        str, typer.Option(metavar="NAME", help="uniform: one format for all experts; see `moqc allocators`.")
    ] = "global",
    target: TargetName = "native",
    bandwidth: Annotated[
        float | None,
        typer.Option(metavar="GB/S", help="Memory bandwidth of the machine. [default: the target's]"),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens a sequence may have. [default: the model's, at most 4096]"),
    ] = None,
    max_batch: Annotated[int, typer.Option("--max-batch", metavar="N", help="Sequences at once.")] = 4,
    calib_tokens: CalibrationTokens = 32_768,
    as_json: Json = False,
) -> None:
    """Predict size, memory, speed and compile time from a model's configuration; no weights are read."""
    from moqc.api import plan

    if bits is None and size is None and latency is None:
        bits = 3.0
    result = plan(
        model,
        bits=bits,
        size=None if size is None else parse_bytes(size),
        latency=None if latency is None else parse_seconds(latency),
        linears=linears,
        allocator=allocator,
        target=target,
        bandwidth=bandwidth,
        context=context,
        max_batch=max_batch,
        calibration_tokens=calib_tokens,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(plan: Plan) -> None:
    model, chosen, effort = plan.model, plan.chosen, plan.effort
    active, total = chosen.stored.token_weights, plan.total_weights
    speed = _speed(chosen)
    blocks = f"{len(model.experts)} blocks of {model.experts[0].layout.experts} experts"
    for label, text in (
        ("model", f"{model.model_type}: {count_text(total)} weights, {count_text(active)} a token; {blocks}"),
        ("target", f"{plan.target}, context {plan.deployment.context}, {plan.deployment.batch} sequences"),
        ("experts", f"{chosen.bits:.4g} file bits per weight"),
        ("file", f"{bytes_text(chosen.file_bytes)} ({chosen.file_bytes:,} bytes)"),
        ("memory", f"{bytes_text(chosen.peak_bytes)} at the peak, with full caches and prompts"),
        ("cache", f"{bytes_text(chosen.stored.kv_bytes_per_token)} a token and sequence"),
        ("reads", f"{bytes_text(chosen.stored.token_bytes)} of weights a token"),
        ("decoding", speed),
        (
            "to make it",
            f"calibration {seconds_text(effort.calibration_seconds)}, quantization "
            f"{seconds_text(effort.quantization_seconds)}, build {seconds_text(effort.build_seconds)} "
            f"({effort.machine})",
        ),
    ):
        typer.echo(f"{label:10}  {text}")
    typer.echo()
    print_table(
        ("tokens so far", "cache of a sequence", "tokens/s"),
        [(length, bytes_text(cache), _rate(rate)) for length, cache, rate in plan.contexts],
    )
    typer.echo()
    rows = [("this plan", chosen), *((row.name, row) for row in plan.alternatives)]
    print_table(
        ("alternative", "expert file bits", "file", "memory", "tokens/s", "bound"),
        [
            (
                name,
                f"{row.bits:.3f}",
                bytes_text(row.file_bytes),
                bytes_text(row.peak_bytes),
                _rate(None if row.speed is None else 1 / row.speed.seconds),
                None if row.speed is None else row.speed.bound,
            )
            for name, row in rows
        ],
    )
    typer.echo(f"\nspeed: {plan.speed_source}")


def _speed(chosen: Prediction) -> str:
    if chosen.speed is None:
        return "unknown for this target: give --bandwidth"
    return f"{_rate(1 / chosen.speed.seconds)} tokens/s, limited by {chosen.speed.bound}"


def _rate(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
