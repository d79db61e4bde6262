"""The report in a terminal: a heat map of bits with one character an expert, and tables."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moqc.report.data import Block, Report
from moqc.report.page import cold_rows, uniform_rows
from moqc.report.svg import bits_color
from moqc.report.why import why

_PALE_UNTIL = 2.6
"""Bits up to which the color of a cell is light and wants black text."""


def print_report(report: Report, console: Console) -> None:
    """Print it; without colors the digits remain."""
    if not report.blocks:
        console.print("the experts are not quantized")
        return
    console.print("bits of each expert (mean of its projections, rounded), one row a layer:\n")
    for block in report.blocks:
        console.print(_row(block), soft_wrap=True)
    console.print()
    for sentence in why(report):
        console.print(sentence, soft_wrap=True)
    rows = uniform_rows(report)
    if rows:
        table = Table("experts", "file bits", "size", "predicted harm", box=None, pad_edge=False)
        for row in rows:
            harm = "-" if row["harm"] is None else f"{row['harm']:.3g}"
            size = f"{row['bytes'] / 2**20:,.2f} MiB"
            table.add_row(row["name"], f"{row['bits']:.3f}", size, harm)
        console.print()
        console.print(table)
    cold = [row for row in cold_rows(report) if row["starved"]]
    if cold:
        named = ", ".join(f"{row['layer']}/{row['expert']} ({row['tokens']})" for row in cold)
        console.print(
            f"\nfewer calibration tokens than columns, layer/expert (tokens): {named}", soft_wrap=True
        )


def _row(block: Block) -> Text:
    text = Text(f"{block.label:>4} ")
    for bits in map(float, block.mean_bits):
        ink = "black" if bits < _PALE_UNTIL else "white"
        text.append(f"{min(bits, 9.4):.0f}", style=f"{ink} on {bits_color(bits)}")
    text.append(f"  {float(block.mean_bits.mean()):.2f}")
    return text
