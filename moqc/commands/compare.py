"""`moqc compare`: plans side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from moqc import log
from moqc.commands.options import (
    Json,
    Markdown,
    ModelArgument,
    Quiet,
    Text,
    options,
    print_json,
    print_rows,
    print_table,
)
from moqc.errors import UserError
from moqc.options import CompareOptions, RuleOptions
from moqc.units import split_integers

if TYPE_CHECKING:
    from moqc.evaluate.skips import SkipComparison

PLANS = (
    "uniform:rtn,uniform:gptq,frequency,block-importance,outlier-score,"
    "ewq,moqa,pmq,pmq:mcmoe,gemq,mxmoe,global"
)

BITS = 2.5
PRUNED_ONLY = {
    "bits",
    "plans",
    "linears",
    "tokens",
    "window",
    "calibration",
    "calibration_tokens",
    "cache",
    "seeds",
}
"""Options that --prune goes with."""


@options(choices=CompareOptions, pruning=RuleOptions)
def command(
    model: ModelArgument,
    text: Text,
    choices: dict[str, Any],
    pruning: dict[str, Any],
    as_json: Json = False,
    as_markdown: Markdown = False,
    quiet: Quiet = False,
) -> None:
    """Evaluate plans side by side, on the same text. Nothing is compiled."""
    from moqc.api import compare

    if quiet or as_json:
        log.be_quiet()
    if not {"bits", "model_bits"} & set(choices):
        choices["bits"] = (BITS,)
    if pruning:
        result = _compare_pruning(model, text, choices, pruning)
        if as_json:
            print_json(result.to_dict())
        else:
            _print_skips(result, markdown=as_markdown)
        return
    found = compare(model, text, **{"plans": PLANS, **choices})
    if as_json:
        print_json(found.to_dict())
        return
    from moqc.evaluate.summary import headline, markdown, table

    if as_markdown:
        typer.echo(markdown(found))
        return
    typer.echo(f"{headline(found)}\n")
    print_table(*table(found))


def _compare_pruning(
    model: str, text: list[Path], choices: dict[str, Any], pruning: dict[str, Any]
) -> SkipComparison:
    from moqc.api import compare_pruning

    if "prune" not in pruning:
        given = " and ".join("--prune-rules" if name == "rules" else f"--{name}" for name in sorted(pruning))
        raise UserError(f"{given} without --prune: give the share of the experts' work to skip")
    seeds = split_integers(choices.pop("seeds", "0"))
    others = set(choices) - PRUNED_ONLY
    if others or len(seeds) != 1:
        raise UserError("with --prune there are expert bits, plans and text only, and one seed")
    return compare_pruning(model, text, **{"plans": "global", **choices}, **pruning, seed=seeds[0])


def _print_skips(result: SkipComparison, *, markdown: bool) -> None:
    shares = ", ".join(f"{share:.1%}" for share in result.shares)
    typer.echo(f"{shares} of the experts' work to skip, on {result.tokens} predictions\n")
    header = ("plan", "bits", "rule", "share", "skipped", "loss", "increase", "+-", "KLD", "bytes a token")
    print_rows(
        (*header, "tokens/s (predicted)"),
        [
            (
                row.plan,
                row.target_bits,
                row.rule,
                row.share,
                row.skipped_fraction,
                row.loss,
                row.loss_increase,
                row.standard_error,
                row.kld,
                row.active_bytes_per_token,
                None if row.decode_tokens_per_s is None else f"{row.decode_tokens_per_s:.4g}",
            )
            for row in result.rows
        ],
        markdown=markdown,
    )
    typer.echo(f"\ntokens/s on {result.target}: {result.speed_source}")
