"""`moqc plan`: what a compilation would give, before anything is read or run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moqc.commands.options import Json, options, print_json, print_table
from moqc.options import PlanOptions
from moqc.units import bytes_text, count_text, seconds_text

if TYPE_CHECKING:
    from moqc.predict.plan import Plan, Prediction


DEFAULT_BITS = 3.0


@options(choices=PlanOptions)
def command(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint folder, config.json, hub id, or qwen3-30b-a3b etc."),
    ],
    choices: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Predict size, memory, speed and time to compile. A model's configuration is read, no weights."""
    from moqc.api import plan

    if not {"bits", "size", "latency"} & set(choices):
        choices["bits"] = DEFAULT_BITS
    result = plan(model, **choices)
    if as_json:
        print_json(result.to_dict())
    else:
        _print(result)


def _print(plan: Plan) -> None:
    for label, text in _facts(plan):
        typer.echo(f"{label:10}  {text}")
    typer.echo()
    print_table(
        ("tokens so far", "cache of a sequence", "tokens/s"),
        [(length, bytes_text(cache), _rate(rate)) for length, cache, rate in plan.contexts],
    )
    typer.echo()
    rows = [("this plan", plan.chosen), *((row.name, row) for row in plan.alternatives)]
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


def _facts(plan: Plan) -> list[tuple[str, str]]:
    """What is said in a line each, by its label."""
    model, chosen, effort = plan.model, plan.chosen, plan.effort
    active, total = chosen.stored.token_weights, plan.total_weights
    blocks = f"{len(model.experts)} blocks of {model.experts[0].layout.experts} experts"
    seconds = (
        f"calibration {seconds_text(effort.calibration_seconds)}, quantization "
        f"{seconds_text(effort.quantization_seconds)}, build {seconds_text(effort.build_seconds)}"
    )
    return [
        ("model", f"{model.model_type}: {count_text(total)} weights, {count_text(active)} a token; {blocks}"),
        ("target", f"{plan.target}, context {plan.deployment.context}, {plan.deployment.batch} sequences"),
        ("experts", f"{chosen.bits:.4g} file bits per weight"),
        ("file", f"{bytes_text(chosen.file_bytes)} ({chosen.file_bytes:,} bytes)"),
        ("memory", f"{bytes_text(chosen.peak_bytes)} at the peak, with full caches and prompts"),
        ("cache", f"{bytes_text(chosen.stored.kv_bytes_per_token)} a token and sequence"),
        ("reads", f"{bytes_text(chosen.stored.token_bytes)} of weights a token"),
        ("decoding", _speed(chosen)),
        ("to make it", f"{seconds} ({effort.machine}; where torch sees a GPU, far less)"),
    ]


def _speed(chosen: Prediction) -> str:
    if chosen.speed is None:
        return "unknown for this target: give --bandwidth"
    return f"{_rate(1 / chosen.speed.seconds)} tokens/s, limited by {chosen.speed.bound}"


def _rate(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"
