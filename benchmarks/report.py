"""Join the runs into one file and one table: ``python benchmarks/report.py FOLDER RESULTS.json PAGE.md``.

FOLDER holds ``layers.json``, ``humming.json``, ``ceilings.json`` and ``run.json`` (date, versions, commands)
of one session on one machine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from workload import SHAPES

NODE_US = 2.8
"""Cost of a cold kernel in a graph, beside its bytes."""


def floor_us(row: dict[str, Any], ceilings: dict[str, float]) -> float:
    """Two kernels and the bytes of the experts hit, at the bandwidth measured in the run."""
    return 2 * NODE_US + row["hit_bytes"] / ceilings["read_tb_per_s"] / 1e6


def humming_bits(case: str) -> str | None:
    """Humming's nearest case: the same code width; none for mixed layers."""
    width = case.partition("-")[0]
    return width if width in ("w1", "w2", "w3", "w4") else None


def table(results: dict[str, Any]) -> str:
    """The layer times as a Markdown table, with the ratio to Humming of the same run."""
    rows, ceilings = results["rows"], results["ceilings"]
    peers = {(r["shape"], r["bits"], r["tokens"]): r["us"] for r in rows if r["provider"] == "humming"}
    own = [row for row in rows if row["provider"] == "moqc"]
    heads = [
        "shape",
        "tokens",
        "bits",
        "moqc µs",
        "TB/s",
        "TFLOP/s",
        "floor µs",
        "Humming µs",
        "moqc / Humming",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in sorted(own, key=lambda r: (r["shape"], r["tokens"])):
        peer = peers.get((row["shape"], humming_bits(row["bits"]), row["tokens"]))
        against = ["–", "–"] if peer is None else [f"{peer:.1f}", f"{row['us'] / peer:.2f}"]
        shape = SHAPES[row["shape"]]
        flop = 6 * row["tokens"] * shape.top_k * shape.hidden * shape.intermediate
        cells = [row["shape"], row["tokens"], row["bits"], f"**{row['us']:.1f}**"]
        cells += [f"{row['hit_bytes'] / row['us'] / 1e6:.2f}", f"{flop / row['us'] / 1e6:.0f}"]
        cells += [
            f"{max(floor_us(row, ceilings), flop / ceilings['bf16_matmul_8192_tflop_per_s'] / 1e6):.1f}"
        ]
        lines.append(f"| {' | '.join(map(str, [*cells, *against]))} |")
    return "\n".join(lines)


def main() -> None:
    folder, out, page = (Path(argument) for argument in sys.argv[1:4])
    read = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in ("layers", "humming", "ceilings", "run")
    }
    results = {
        "run": read["run"],
        "ceilings": read["ceilings"],
        "rows": [*read["layers"], *read["humming"], *read.get("grouped_mm", [])],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    begin, _, rest = page.read_text().partition("<!-- table -->")
    end = rest.partition("<!-- end -->")[2]
    page.write_text(f"{begin}<!-- table -->\n{table(results)}\n<!-- end -->{end}")


if __name__ == "__main__":
    main()
