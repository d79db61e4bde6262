"""Figures of the report as inline SVG: colors are CSS variables of the page, so both of its themes work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from moqc.report.frontier import Point

# Viridis at 11 steps, reversed: more bits are darker.
_SCALE = (
    "#fde725",
    "#c2df23",
    "#86d549",
    "#52c569",
    "#2ab07f",
    "#1e9b8a",
    "#25858e",
    "#2d708e",
    "#38588c",
    "#433e85",
    "#440154",
)
_MOST_TITLES = 6000
"""Cells up to which each has a tooltip of its own."""


def bits_color(bits: float) -> str:
    """Color of a number of bits, light to dark; most of the scale is for 1 to 4.4 bits."""
    place = (bits - 1) / 3.4 * 0.86 if bits < 4.4 else 0.86 + (bits - 4.4) / 3.6 * 0.14
    place = min(max(place, 0.0), 1.0)
    return _SCALE[round(place * (len(_SCALE) - 1))]


def cell_size(columns: int, rows: int) -> tuple[float, float]:
    """(width, height) of a heat map's cell in pixels."""
    width = 18.0 if columns <= 16 else 9.6 if columns <= 40 else 5.5 if columns <= 80 else 3.5
    height = 18.0 if rows <= 12 else 10.0 if rows <= 40 else 7.0
    return (width if columns <= 256 else 900 / columns), height


def heat_map(
    values: Sequence[Sequence[float | None]],
    labels: Sequence[str],
    color: Callable[[float], str],
    tip: Callable[[int, int], str],
    name: str,
) -> str:
    """Rows (layers) of cells (experts); `tip` gives the tooltip of (row, column), `name` says what it is."""
    rows, columns = len(values), max(len(row) for row in values)
    width, height = cell_size(columns, rows)
    left, bottom = 26, 26
    total_width, total_height = left + width * columns + 2, height * rows + bottom
    parts = [_open(total_width, total_height, name)]
    titled = rows * columns <= _MOST_TITLES
    for at, row in enumerate(values):
        parts.append(f'<text class="tick" x="{left - 4}" y="{height * (at + 0.72):.1f}">{labels[at]}</text>')
        for number, value in enumerate(row):
            if value is None:
                continue
            title = f"<title>{escape(tip(at, number))}</title>" if titled else ""
            parts.append(
                f'<rect x="{left + width * number:.1f}" y="{height * at:.1f}" width="{width - 0.6:.1f}" '
                f'height="{height - 0.8:.1f}" {color(value)}>{title}</rect>'
            )
    middle = left + width * columns / 2
    step = max(1, columns // 4)
    for number in range(0, columns, step):
        x = left + width * (number + 0.5)
        parts.append(f'<text class="tick x" x="{x:.1f}" y="{height * rows + 10}">{number}</text>')
    parts.append(f'<text class="axis" x="{middle:.1f}" y="{height * rows + 22}">expert</text></svg>')
    return "".join(parts)


def solid(value: float) -> str:
    """Fill of a cell that shows bits."""
    return f'fill="{bits_color(value)}"'


def shade(value: float) -> str:
    """Fill of a cell that shows a share from 0 to 1 of the largest."""
    return f'class="shade" fill-opacity="{0.04 + 0.96 * value:.2f}"'


def layer_bars(values: Sequence[float], texts: Sequence[str], labels: Sequence[str], name: str) -> str:
    """One horizontal bar a layer, from 0 to the largest, with its number beside."""
    _, height = cell_size(1, len(values))
    left, room, bottom = 26, 90, 26
    largest = max([*values, 1e-300])
    parts = [_open(left + room + 44, height * len(values) + bottom, name)]
    for at, value in enumerate(values):
        y = height * at
        parts.append(
            f'<text class="tick" x="{left - 4}" y="{y + height * 0.72:.1f}">{labels[at]}</text>'
            f'<rect class="bar" x="{left}" y="{y:.1f}" width="{room * value / largest:.1f}" '
            f'height="{height - 1.5:.1f}"/>'
            f'<text class="value" x="{left + room * value / largest + 4:.1f}" y="{y + height * 0.72:.1f}">'
            f"{escape(texts[at])}</text>"
        )
    parts.append("</svg>")
    return "".join(parts)


def line_chart(
    line: Sequence[Point],
    dots: Sequence[Point],
    plan: Point,
    x_label: str,
    y_label: str,
) -> str:
    """A curve with named dots and one highlighted, y on a logarithmic scale."""
    chart = _Axes([*line, *dots, plan])
    name = f"{y_label} over {x_label}"
    parts = [_open(chart.width, chart.height, name), chart.frame(x_label, y_label)]
    path = " ".join(
        f"{'L' if at else 'M'}{chart.x(point.bits):.1f},{chart.y(point.cost):.1f}"
        for at, point in enumerate(line)
    )
    parts.append(f'<path class="line" d="{path}"/>')
    for number, point in enumerate(dots):
        x, y = chart.x(point.bits), chart.y(point.cost)
        below = 14 if number % 2 else -5
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
            f'<text class="note" x="{x + 7:.1f}" y="{y + below:.1f}">{escape(point.name)}</text>'
        )
    x, y = chart.x(plan.bits), chart.y(plan.cost)
    parts.append(
        f'<circle class="plan" cx="{x:.1f}" cy="{y:.1f}" r="6"/>'
        f'<text class="note strong" text-anchor="end" x="{x - 9:.1f}" y="{y + 14:.1f}">'
        f"{escape(plan.name)}</text></svg>"
    )
    return "".join(parts)


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """A dot for each point, small, with its name as a tooltip; y on a logarithmic scale."""
    chart = _Axes(points, width=400.0, height=210.0)
    parts = [_open(chart.width, chart.height, f"{y_label} over {x_label}"), chart.frame(x_label, y_label)]
    for point in points:
        title = f"<title>{escape(point.name)}</title>" if len(points) <= _MOST_TITLES else ""
        parts.append(
            f'<circle r="3" cx="{chart.x(point.bits):.1f}" cy="{chart.y(point.cost):.1f}" '
            f'fill="{bits_color(point.bits)}" class="ringed">{title}</circle>'
        )
    parts.append("</svg>")
    return "".join(parts)


def circle_graph(
    order: Sequence[int], edges: Sequence[tuple[int, int, float]], centrality: Sequence[float], name: str
) -> str:
    """Experts on a circle in `order`, edges (expert, expert, weight of 0 to 1), dots sized by centrality."""
    size, radius = 170.0, 62.0
    places = {}
    for at, expert in enumerate(order):
        angle = 2 * math.pi * at / len(order) - math.pi / 2
        places[expert] = (size / 2 + radius * math.cos(angle), size / 2 + radius * math.sin(angle))
    parts = [_open(size, size, name)]
    for one, other, weight in edges:
        (x1, y1), (x2, y2) = places[one], places[other]
        parts.append(
            f'<line class="edge" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
            f'stroke-width="{0.6 + 3.4 * weight:.1f}"/>'
        )
    linked = {expert for edge in edges for expert in edge[:2]}
    largest = max([*centrality, 1e-300])
    for expert, (x, y) in places.items():
        share = math.sqrt(centrality[expert] / largest)
        title = f"<title>{escape(f'expert {expert}')}</title>"
        parts.append(
            f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{1 + 4 * share:.1f}">{title}</circle>'
        )
        if expert in linked:
            out = 1.22
            tx, ty = (size / 2 + out * (value - size / 2) for value in (x, y))
            parts.append(f'<text class="tick x" x="{tx:.1f}" y="{ty + 3.5:.1f}">{expert}</text>')
    parts.append("</svg>")
    return "".join(parts)


class _Axes:
    """Scales of a chart: x linear, y logarithmic."""

    left, bottom = 64.0, 44.0

    def __init__(self, points: Sequence[Point], width: float = 560.0, height: float = 300.0) -> None:
        self.width, self.height = width, height
        costs = [max(point.cost, 1e-12) for point in points]
        self._low, self._high = math.log10(min(costs)), math.log10(max(costs))
        pad = 0.06 * max(self._high - self._low, 0.1)
        self._low, self._high = self._low - pad, self._high + pad
        bits = [point.bits for point in points]
        self._first, self._last = min(bits) - 0.15, max(bits) + 0.45

    def x(self, bits: float) -> float:
        share = (bits - self._first) / (self._last - self._first)
        return self.left + share * (self.width - self.left - 10)

    def y(self, cost: float) -> float:
        share = (math.log10(max(cost, 1e-12)) - self._low) / (self._high - self._low)
        return 8 + (1 - share) * (self.height - self.bottom - 8)

    def frame(self, x_label: str, y_label: str) -> str:
        """Axes, grid lines, ticks and labels."""
        base, parts = self.height - self.bottom, []
        for bits in range(math.ceil(self._first), math.floor(self._last) + 1):
            x = self.x(bits)
            parts.append(
                f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="8" y2="{base}"/>'
                f'<text class="tick x" x="{x:.1f}" y="{base + 14}">{bits}</text>'
            )
        for value in self._ticks():
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{self.left}" x2="{self.width - 10}" y1="{y:.1f}" y2="{y:.1f}"/>'
                f'<text class="tick" x="{self.left - 6}" y="{y + 3.5:.1f}">{value:g}</text>'
            )
        middle = (self.left + self.width) / 2
        parts.append(
            f'<text class="axis" x="{middle:.0f}" y="{self.height - 8}">{escape(x_label)}</text>'
            f'<text class="axis" transform="translate(14 {base / 2:.0f}) rotate(-90)">'
            f"{escape(y_label)}</text>"
        )
        return "".join(parts)

    def _ticks(self) -> list[float]:
        steps = (1, 2, 5) if self._high - self._low < 2 else (1,)
        powers = range(math.floor(self._low), math.ceil(self._high) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
        return [value for value in found if self._low <= math.log10(value) <= self._high]


def _open(width: float, height: float, name: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(name)}">'
    )
