"""Make the table of kernel times that allocation reads from what was measured on an H200.

    python benchmarks/kernel_costs.py schedules/kernel_costs/sm_90.json

Formats in groups of 128 come from the search of plans (``schedules/cuda/records.json``), those in groups
of 64 from the decode kernels of ``results/h200.json``. A launch serves the matrices of all experts hit; each
gets an equal share.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workload import SHAPES, Shape

from moqc.schedules.cuda import records

RESULTS = Path(__file__).parent / "results" / "h200.json"


def experts_hit(shape: Shape, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose at random, on average."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def entry(shape: Shape, kernel: str, fmt: str, tokens: int, microseconds: float) -> dict[str, Any]:
    """The share of one matrix."""
    first = kernel == "gate_up"
    sizes = (shape.intermediate, shape.hidden) if first else (shape.hidden, shape.intermediate)
    each = microseconds / experts_hit(shape, tokens) / (2 if first else 1)
    facts = {"rows": sizes[0], "columns": sizes[1], "format": fmt, "tokens": tokens}
    return {**facts, "microseconds": round(each, 4)}


def searched() -> Iterator[dict[str, Any]]:
    """What the search of plans measured."""
    for row in records.load()["records"]:
        shape = Shape(row["experts"], row["top_k"], row["hidden"], row["intermediate"])
        fmt = f"int{row['bits']}-g128{'' if row['zeros'] else '-sym'}"
        if not row["several"]:
            yield entry(shape, row["kernel"], fmt, row["tokens"], row["microseconds"])


def benched() -> Iterator[dict[str, Any]]:
    """Asymmetric formats in groups of 64."""
    for row in json.loads(RESULTS.read_text())["rows"]:
        match = re.fullmatch(r"w(\d)-g64-asym", row["bits"])
        if row["provider"] != "moqc" or match is None:
            continue
        for kernel in ("gate_up", "down"):
            shape, us = SHAPES[row["shape"]], row[f"{kernel}_us"]
            yield entry(shape, kernel, f"int{match[1]}-g64", row["tokens"], us)


def main() -> None:
    source = f"{records.load()['source']}; int*-g64: benchmarks/results/{RESULTS.name}"
    rows = [*searched(), *benched()]
    text = json.dumps({"schema": 2, "source": source, "matrices": rows}, indent=1)
    Path(sys.argv[1]).write_text(text + "\n")


if __name__ == "__main__":
    main()
