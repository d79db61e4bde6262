"""Make the table of kernel times that allocation reads from the results of the decode benchmark.

    python benchmarks/kernel_costs.py benchmarks/results/h200.json schedules/kernel_costs/cuda.json

A layer's launch serves the matrices of all experts hit by one token; each gets an equal share.
"""

import json
import re
import sys
from pathlib import Path

SHAPES = {"mixtral-8x7b": (4096, 14336, 2), "qwen3-30b-a3b": (2048, 768, 8), "olmoe-1b-7b": (2048, 1024, 8)}
"""hidden, intermediate, experts a token."""


def format_of(bits: str) -> str | None:
    """``w4`` is group 128 and symmetric, ``w3-g64-asym`` says what it is; None for a mix."""
    match = re.fullmatch(r"w(\d)(-g(\d+)-asym)?", bits)
    if match is None:
        return None
    return f"int{match[1]}-g{match[3]}" if match[2] else f"int{match[1]}-g128-sym"


def main() -> None:
    results, out = (Path(argument) for argument in sys.argv[1:3])
    content = json.loads(results.read_text())
    matrices = []
    for row in content["rows"]:
        name = format_of(row["bits"])
        if row["provider"] != "moqc" or row["tokens"] != 1 or name is None:
            continue
        hidden, intermediate, top_k = SHAPES[row["shape"]]
        for rows, columns, microseconds in (
            (intermediate, hidden, row["gate_up_us"] / (2 * top_k)),
            (hidden, intermediate, row["down_us"] / top_k),
        ):
            entry = {"rows": rows, "columns": columns, "format": name}
            matrices.append({**entry, "microseconds": round(microseconds, 4)})
    source = f"{results.name}: {content['run']['gpu']}, {content['run']['date']}, 1 token, CUDA-graph replay"
    table = {"schema": 1, "source": source, "matrices": matrices}
    out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
