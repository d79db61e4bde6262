"""The report as one HTML file that needs nothing else: no network, no scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from moqc.report.data import Block, Report
from moqc.report.frontier import Point, frontier, uniform_points
from moqc.report.svg import bits_color, circle_graph, heat_map, layer_bars, line_chart, scatter, shade, solid
from moqc.report.why import cheap_format, why

_COLD = 12
"""Experts listed as least used."""


def render(report: Report) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("moqc.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bytes"] = _bytes
    template = environment.get_template("report.html.jinja")
    manifest = report.manifest
    return template.render(
        report=report,
        manifest=manifest,
        sizes=manifest.sizes,
        panels=_panels(report),
        legend=_legend(report),
        why=why(report),
        scatter=_scatter(report),
        trade=_trade(report),
        uniform=uniform_rows(report),
        cold=cold_rows(report),
        graphs=_graphs(report),
        command=_command(report),
        linears=sorted(Counter(manifest.linear_bits.values()).items()),
        extras=report.extras,
    )


def _bytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"


def _command(report: Report) -> str | None:
    if report.recipe is None:
        return None
    return report.recipe.command(report.manifest.source.path, f"{report.name}-moqc")


def _panels(report: Report) -> list[dict[str, Any]]:
    """The heat maps side by side: bits by projection, then what they were decided by, then by layer."""
    labels = [block.label for block in report.blocks]
    panels: list[dict[str, Any]] = []

    def add(title: str, note: str, svg: str) -> None:
        panels.append({"title": title, "note": note, "svg": Markup(svg)})

    for projection in report.projections:
        rows = [list(map(float, block.bits[projection])) for block in report.blocks]
        add(
            f"bits of {projection}",
            "file bits per weight",
            heat_map(rows, labels, solid, _format_tip(report, projection), f"bits of {projection}"),
        )
    shares = [block.share for block in report.blocks]
    if all(share is not None for share in shares):
        add("activation", "share of the layer's routed tokens", _shaded(report, lambda b: b.share, "{:.2%}"))
    cheap = cheap_format(report)
    if cheap is not None:
        add(
            "harm",
            f"if stored in {cheap}; square root",
            _shaded(
                report,
                lambda b: np.sqrt(harm) if (harm := b.harm(cheap)) is not None else None,
                "{:.3g}",
                over_all=True,
            ),
        )
    title, note, weights = _layer_weights(report, cheap)
    if weights is not None:
        largest = max(weights) or 1.0
        values = [value / largest for value in weights]
        texts = [f"{value:.2f}" for value in values]
        add(title, note, layer_bars(values, texts, labels, f"{title} of each layer"))
    means = [float(block.mean_bits.mean()) for block in report.blocks]
    add(
        "mean bits",
        "of the layer's experts",
        layer_bars(means, [f"{value:.2f}" for value in means], labels, "mean bits of each layer"),
    )
    return panels


def _layer_weights(report: Report, cheap: str | None) -> tuple[str, str, list[float] | None]:
    """What layers are compared by: measured sensitivity, or the harm of all their experts."""
    known = [block.sensitivity for block in report.blocks]
    if all(value is not None for value in known):
        return "sensitivity", "of the answer to its errors", [value or 0.0 for value in known]
    harms = [None if cheap is None else block.harm(cheap) for block in report.blocks]
    if any(harm is None for harm in harms):
        return "", "", None
    return "harm of layer", f"all in {cheap}", [float(harm.sum()) for harm in harms if harm is not None]


def _scatter(report: Report) -> Markup | None:
    """Each expert's mean bits and its harm in a cheap format, relative to the largest."""
    cheap = cheap_format(report)
    harms = [None if cheap is None else block.harm(cheap) for block in report.blocks]
    known = [harm for harm in harms if harm is not None]
    largest = max((float(harm.max()) for harm in known), default=0.0)
    if len(known) < len(report.blocks) or not largest:
        return None
    points = [
        Point(f"layer {block.label}, expert {expert}", float(bits), float(harm[expert]) / largest)
        for block, harm in zip(report.blocks, known, strict=True)
        for expert, bits in enumerate(block.mean_bits)
        if harm[expert] > 0
    ]
    return Markup(scatter(points, "mean bits of an expert", f"harm in {cheap}"))


def _graphs(report: Report) -> list[dict[str, Any]]:
    """Co-activation of each layer: the pairs that fire together most, experts ordered by community."""
    graphs = []
    for block in report.blocks:
        found = block.coactivation
        if not found or not found["pairs"]:
            continue
        most = max(tokens for _, _, tokens, _ in found["pairs"])
        edges = [(one, other, tokens / most) for one, other, tokens, _ in found["pairs"]]
        order = [expert for community in found["communities"] for expert in community]
        title = f"layer {block.label}"
        note = f"{len(found['communities'])} communities"
        svg = circle_graph(order, edges, found["centrality_ppm"], f"co-activation of {title}")
        graphs.append({"title": title, "note": note, "svg": Markup(svg)})
    return graphs


def _format_tip(report: Report, projection: str) -> Callable[[int, int], str]:
    def tip(row: int, expert: int) -> str:
        block = report.blocks[row]
        name = block.formats[projection][expert]
        used = "" if block.share is None else f", {block.share[expert]:.2%} of its tokens"
        return f"layer {block.label}, expert {expert}, {projection}: {name}{used}"

    return tip


def _shaded(report: Report, values: Callable[[Block], Any], text: str, *, over_all: bool = False) -> str:
    """A heat map of values relative to the largest, of their layer or of all layers."""
    found = [values(block) for block in report.blocks]
    top = max((float(np.max(row)) for row in found), default=1.0) or 1.0
    scaled = [
        [float(value) / (top if over_all else float(np.max(row)) or 1.0) for value in row] for row in found
    ]

    def tip(row: int, expert: int) -> str:
        return f"layer {report.blocks[row].label}, expert {expert}: {text.format(float(found[row][expert]))}"

    return heat_map(scaled, [block.label for block in report.blocks], shade, tip, "by expert")


def _legend(report: Report) -> list[dict[str, Any]]:
    """Formats in use with their color and count, ascending."""
    counts: Counter[str] = Counter()
    bits: dict[str, float] = {}
    for block in report.blocks:
        for projection, names in block.formats.items():
            counts.update(names)
            bits |= dict(zip(names, map(float, block.bits[projection]), strict=True))
    total = sum(counts.values())
    return [
        {"name": name, "color": bits_color(bits[name]), "share": counts[name] / total, "bits": bits[name]}
        for name in sorted(counts, key=lambda name: bits[name])
    ]


def _trade(report: Report) -> Markup | None:
    """The chart of size against predicted harm, in units of the plan's harm."""
    cost = report.plan_cost
    if not cost:
        return None
    unit = [Point(point.name, point.bits, point.cost / cost) for point in frontier(report)]
    dots = [Point(point.name, point.bits, point.cost / cost) for point in uniform_points(report)]
    if not unit:
        return None
    plan = Point("this artifact", report.manifest.sizes.expert_file_bits_per_weight, 1.0)
    return Markup(
        line_chart(unit, dots, plan, "file bits per expert weight", "predicted harm, this artifact = 1")
    )


def uniform_rows(report: Report) -> list[dict[str, Any]]:
    """One format for all, beside the plan: bits, size of all experts, and predicted harm relative to it."""
    cost, weights = report.plan_cost, _expert_weights(report)
    rows: list[dict[str, Any]] = []
    for point in uniform_points(report):
        harm = point.cost / cost if cost else None
        size = round(point.bits * weights / 8)
        rows.append({"name": point.name, "bits": point.bits, "bytes": size, "harm": harm})
    plan_bits = report.manifest.sizes.expert_file_bits_per_weight
    own: dict[str, Any] = {
        "name": "this artifact",
        "bits": plan_bits,
        "bytes": round(plan_bits * weights / 8),
        "harm": 1.0,
    }
    return sorted([*rows, own], key=lambda row: row["bits"]) if rows else []


def _expert_weights(report: Report) -> int:
    return sum(
        shape.experts * rows * columns
        for shape in report.shapes.values()
        for rows, columns in (shape.shape(name) for name in shape.projections)
    )


def cold_rows(report: Report) -> list[dict[str, Any]]:
    """The experts that calibration used least, with what they got."""
    rows: list[dict[str, Any]] = [
        {
            "layer": block.label,
            "expert": expert,
            "tokens": int(block.tokens[expert]),
            "share": float(block.share[expert]),
            "bits": float(block.mean_bits[expert]),
            "starved": int(block.tokens[expert]) < report.shapes[block.site].hidden,
        }
        for block in report.blocks
        if block.tokens is not None and block.share is not None
        for expert in range(block.experts)
    ]
    return sorted(rows, key=lambda row: row["tokens"])[:_COLD]
