"""Join the runs into one file and its tables: ``python benchmarks/report.py FOLDER RESULTS.json PAGE.md``.

FOLDER holds ``layers.json``, ``humming.json``, ``grouped_mm.json``, ``mlc.json``, ``ceilings.json`` and
``run.json`` (date, versions, commands) of one session on one machine. PAGE has a place for each table,
between ``<!-- NAME -->`` and ``<!-- end -->``. Whole models are in ``h200-models.json`` beside RESULTS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cases import CASES
from workload import SHAPES

NODE_US = 2.8
"""Cost of a cold kernel in a graph, beside its bytes."""
WIDTHS = ("w4", "w3", "w2", "w1")
GOALS = {  # microseconds of a layer, of 4, 3, 2 and 1 bits
    ("mixtral-8x7b", 1): (48, 40, 30, 24),
    ("mixtral-8x7b", 8): (172, 140, 108, 85),
    ("qwen3-30b-a3b", 1): (9, 8, 7, 6.5),
    ("qwen3-30b-a3b", 8): (37, 30, 24, 20),
    ("olmoe-1b-7b", 1): (11, 9.5, 8, 7),
}
RATIOS = {16: (0.8, None, 0.6, None), 64: (0.8, None, 0.6, None)} | dict.fromkeys(
    (512, 4096), (1 / 0.95,) * 4
)
"""What a layer may take of Humming's time, by tokens and width."""
MIXED = 1.08
"""What mixed experts may take of the mean of the uniform ones, weighted by their bytes' share."""

Row = dict[str, Any]


def floor_us(row: Row, ceilings: dict[str, float]) -> float:
    """Two kernels and the bytes of the experts hit at the run's read bandwidth, or the products' time."""
    reading = 2 * NODE_US + row["hit_bytes"] / ceilings["read_tb_per_s"] / 1e6
    return max(reading, flop(row) / ceilings["bf16_matmul_8192_tflop_per_s"] / 1e6)


def flop(row: Row) -> float:
    """Operations of a layer's three products."""
    shape = SHAPES[row["shape"]]
    return 6.0 * row["tokens"] * shape.top_k * shape.hidden * shape.intermediate


def width_of(case: str) -> str | None:
    """The peers' nearest case: the same code width; none for mixed layers."""
    width = case.partition("-")[0]
    return width if width in WIDTHS else None


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def ratio(us: float, peer: float | None) -> str:
    return "–" if peer is None else f"{us / peer:.2f}"


class Results:
    """Times of one run by provider, shape, bits and tokens."""

    def __init__(self, rows: list[Row], ceilings: dict[str, float]) -> None:
        self.rows, self.ceilings = rows, ceilings
        self.us = {(r["provider"], r["shape"], r["bits"], r["tokens"]): r["us"] for r in rows}
        self.own = [row for row in rows if row["provider"] == "moqc"]

    def layers(self) -> str:
        """Every layer beside the peers."""
        heads = ["shape", "tokens", "bits", "moqc µs", "TB/s", "TFLOP/s", "floor µs", "Humming µs", "ratio"]
        heads += ["MLC-style µs", "bf16 grouped_mm µs", "dequantize + grouped_mm µs"]
        cells = []
        for row in sorted(self.own, key=lambda r: (r["shape"], r["tokens"])):
            shape, tokens, width = row["shape"], row["tokens"], width_of(row["bits"])
            peer = self.us.get(("humming", shape, width, tokens))
            others = [("mlc-tir", width), ("bf16-grouped-mm", "bf16"), ("dequantize-grouped-mm", "w4")]
            plain = row["bits"] == width
            found = [self.us.get((name, shape, bits, tokens)) if plain else None for name, bits in others]
            if width != "w4":
                found[1:] = [None, None]
            rates = f"{row['hit_bytes'] / row['us'] / 1e6:.2f}", f"{flop(row) / row['us'] / 1e6:.0f}"
            floor = f"{floor_us(row, self.ceilings):.1f}"
            against = ["–" if us is None else f"{us:.1f}" for us in (peer, *found)]
            against.insert(1, ratio(row["us"], peer))
            cells.append([shape, tokens, row["bits"], f"**{row['us']:.1f}**", *rates, floor, *against])
        return table(heads, cells)

    def goals(self) -> str:
        """The issue's goals, cell by cell."""
        cells = []
        for (shape, tokens), wanted in GOALS.items():
            own = [self.us["moqc", shape, width, tokens] for width in WIDTHS]
            cells.append(self._goal(shape, tokens, own, list(wanted)))
        for tokens, most in RATIOS.items():
            for shape in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"):
                own = [self.us["moqc", shape, width, tokens] for width in WIDTHS]
                peers = [self.us.get(("humming", shape, width, tokens)) for width in WIDTHS]
                limits = [peer and share and peer * share for peer, share in zip(peers, most, strict=True)]
                cells.append(self._goal(shape, tokens, own, limits))
        return table(["shape", "tokens", *(f"{w}: µs (goal)" for w in WIDTHS), "of Humming's time"], cells)

    def _goal(
        self, shape: str, tokens: int, own: list[float], limits: Sequence[float | None]
    ) -> list[object]:
        shown = []
        for us, most in zip(own, limits, strict=True):
            met = "" if most is None else f" ({most:.4g}, {'met' if us <= most else 'missed'})"
            shown.append(f"{us:.1f}{met}")
        peers = [self.us.get(("humming", shape, width, tokens)) for width in WIDTHS]
        ratios = " / ".join(ratio(us, peer) for us, peer in zip(own, peers, strict=True))
        return [shape, tokens, *shown, ratios]

    def mixed(self) -> str:
        """Experts of 4, 3, 2 and 1 bits in turn, beside the mean of the four uniform layers."""
        cells = []
        for shape in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b"):
            for tokens in (1, 8):
                us = self.us["moqc", shape, "mixed", tokens]
                mean = sum(self.us["moqc", shape, width, tokens] for width in WIDTHS) / len(WIDTHS)
                met = "met" if us <= MIXED * mean else "missed"
                cells.append([shape, tokens, f"{us:.1f}", f"{mean:.1f}", f"{us / mean - 1:+.1%} ({met})"])
        return table(["shape", "tokens", "mixed µs", "mean of w4, w3, w2, w1", "more"], cells)

    def formats(self) -> str:
        """Layers of other formats, and what a byte takes beside the symmetric format of the same width."""
        found = {(row["shape"], row["tokens"], row["bits"]): row for row in self.own}
        timed = {case for *_, case in found}
        cases = [case for case in CASES if case in timed and width_of(case) not in (None, case)]
        cells = []
        for shape, tokens in ((shape, tokens) for shape in SHAPES for tokens in (1, 8)):
            line = []
            for case in cases:
                row, plain = found.get((shape, tokens, case)), found.get((shape, tokens, width_of(case)))
                if row is None or plain is None:
                    line.append("–")
                    continue
                more = row["us"] / row["hit_bytes"] / (plain["us"] / plain["hit_bytes"])
                line.append(f"{row['us']:.1f} ({more:.2f})")
            if set(line) != {"–"}:
                cells.append([shape, tokens, *line])
        return table(["shape", "tokens", *cases], cells)


def models(rows: Sequence[Row]) -> str:
    """Whole models, beside transformers."""
    heads = ["model", "tokens", "transformers bf16 tokens/s", "moqc tokens/s", "launches a step"]
    heads += ["bytes a step", "of the bound"]
    kinds = [(row["model"], "tokens" if "tokens" in row else "prefill") for row in rows]
    peers = {
        (*kind, row[kind[1]]): row["tokens_per_s"]
        for kind, row in zip(kinds, rows, strict=True)
        if row["provider"] != "moqc"
    }
    cells = []
    for (model, kind), row in zip(kinds, rows, strict=True):
        if row["provider"] != "moqc":
            continue
        peer, own = peers[model, kind, row[kind]], f"**{row['tokens_per_s']:.0f}**"
        if kind == "prefill":
            what = f"prefill {row[kind]:,}, {row['chunk']:,} at a time"
            cells.append([model, what, f"{peer:.0f}", own, "–", "–", "–"])
            continue
        step = f"{row['bytes'] / 1e9:.2f} GB", f"**{row['graph_ms'] / row['bound_ms']:.2f}**"
        shown = f"{peer:.3g}" if peer < 100 else f"{peer:.0f}"
        cells.append([model, row[kind], shown, own, row["launches"], *step])
    return table(heads, cells)


def fill(page: str, name: str, text: str) -> str:
    """`page` with `text` in the place called `name`."""
    begin, mark, rest = page.partition(f"<!-- {name} -->")
    if not mark:
        raise SystemExit(f"the page has no place <!-- {name} -->")
    return f"{begin}{mark}\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def main() -> None:
    folder, out, page = (Path(argument) for argument in sys.argv[1:4])
    read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    rows = [row for name in ("layers", "humming", "grouped_mm", "mlc") for row in read.get(name, [])]
    everything = {"run": read["run"], "ceilings": read["ceilings"], "rows": rows}
    out.write_text(json.dumps(everything, indent=1) + "\n")
    results, text = Results(rows, read["ceilings"]), page.read_text()
    for name in ("layers", "goals", "mixed", "formats"):
        text = fill(text, name, getattr(results, name)())
    whole = json.loads((out.parent / "h200-models.json").read_text())
    page.write_text(fill(text, "models", models(whole["rows"])))


if __name__ == "__main__":
    main()
