"""A comparison as a table: one line a plan and budget, means over the seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, pstdev

from moqc.evaluate.compare import Comparison, Row


def table(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
    """Header and lines; columns of what was not asked for are left out."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in comparison.rows:
        budget = f"{row.target_bits:g}{' (model)' if row.whole else ''}"
        groups.setdefault((budget, row.plan), []).append(row)
    several = any(len(rows) > 1 for rows in groups.values())
    header = ["plan", "bits", "expert file bits", "model file bits", "loss", "increase"]
    header += ["seeds", "std"] if several else []
    header += [f"{name} (unseen)" for name in comparison.unseen]
    header += ["flips"] if comparison.questions else []
    header += ["exact"] if comparison.problems else []
    lines: list[tuple[object, ...]] = []
    for (bits, plan), rows in groups.items():
        line: list[object] = [
            plan + (" (simulated)" if rows[0].simulated else ""),
            bits,
            fmean(row.expert_file_bits_per_weight for row in rows),
            fmean(row.model_file_bits_per_weight for row in rows),
            fmean(row.loss for row in rows),
            fmean(row.loss_increase for row in rows),
        ]
        line += [len(rows), pstdev(row.loss_increase for row in rows)] if several else []
        line += [fmean(row.increases[name] for row in rows) for name in comparison.unseen]
        line += [_mean([row.flips for row in rows])] if comparison.questions else []
        line += [_mean([row.exact for row in rows])] if comparison.problems else []
        lines.append(tuple(line))
    return tuple(header), lines


def headline(comparison: Comparison) -> str:
    """What the unquantized model does on the same text and questions."""
    parts = [f"unquantized loss {comparison.reference_loss:.4f} on {comparison.tokens} predictions"]
    if comparison.reference_unseen_loss is not None:
        unseen = f"{comparison.reference_unseen_loss:.4f} on {comparison.unseen_tokens} unseen ones"
        parts.append(f"{unseen} ({', '.join(comparison.unseen)})")
    if comparison.questions:
        parts.append(f"{comparison.questions} questions")
    if comparison.reference_exact is not None:
        parts.append(f"{comparison.reference_exact:.4f} of {comparison.problems} problems exact")
    return "; ".join(parts)


def markdown(comparison: Comparison) -> str:
    """The headline and the table in Markdown."""
    header, lines = table(comparison)
    rows = [header, ["---"] * len(header), *([_cell(value) for value in line] for line in lines)]
    return "\n".join([headline(comparison), "", *(f"| {' | '.join(row)} |" for row in rows)])


def _cell(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _mean(values: Sequence[float | None]) -> float:
    return fmean(value for value in values if value is not None)
