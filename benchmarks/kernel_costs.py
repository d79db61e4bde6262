"""Make the table of kernel times that allocation reads from the results of the layers' benchmark.

    python benchmarks/kernel_costs.py benchmarks/results/h200.json schedules/kernel_costs/sm_90.json

A layer's time is shared out to the matrices of the experts hit, by their stored bits.
"""

import json
import sys
from pathlib import Path

from cases import CASES
from workload import SHAPES

from moqc.quant.formats import Format

TOKENS = (1, 8)


def matrices(row: dict) -> list[dict]:
    """The entries of one measured layer of a single format; none of a mixed one."""
    formats = {name for names in CASES[row["bits"]] for name in names}
    if len(formats) > 1 or row["tokens"] not in TOKENS:
        return []
    shape, fmt = SHAPES[row["shape"]], Format.parse(formats.pop())
    sizes = [(shape.intermediate, shape.hidden), (shape.hidden, shape.intermediate)]
    gate, down = (fmt.stored_bits(*size) for size in sizes)
    each = row["us"] / (row["hit_bytes"] / row["expert_bytes"]) / (2 * gate + down)
    return [
        {
            "rows": rows, "columns": columns, "format": str(fmt), "tokens": row["tokens"],
            "microseconds": round(each * fmt.stored_bits(rows, columns), 4),
        }
        for rows, columns in sizes
    ]  # fmt: skip


def main() -> None:
    results, out = (Path(argument) for argument in sys.argv[1:3])
    content = json.loads(results.read_text())
    rows = [each for row in content["rows"] if row["provider"] == "moqc" for each in matrices(row)]
    run = content["run"]
    source = f"{results.name}: {run['gpu']}, {run['date']}, whole layers, CUDA-graph replay"
    out.write_text(json.dumps({"schema": 2, "source": source, "matrices": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
