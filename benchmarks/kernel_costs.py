"""Make the table of kernel times that allocation reads, from the records of a search of plans.

    python benchmarks/kernel_costs.py sm_90
    python benchmarks/kernel_costs.py x86-64-v4-amx

Reads ``schedules/records/NAME.json`` and updates ``schedules/kernel_costs/NAME.json``: times of matrices
without records stay as they are. For sm_90, formats in groups of 64 come from the decode kernels of
``results/h200-kernels.json``.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workload import SHAPES

from moqc.schedules import plan_records as records
from moqc.schedules.kernel_times import FOLDER, SCHEMA, matrix_times

FIELDS = ("rows", "columns", "format", "tokens")
RESULTS = Path(__file__).parent / "results" / "h200-kernels.json"


def benched() -> Iterator[dict[str, Any]]:
    """Asymmetric formats in groups of 64."""
    for row in json.loads(RESULTS.read_text())["rows"]:
        match = re.fullmatch(r"w(\d)-g64-asym", row["bits"])
        if row["provider"] != "moqc" or match is None:
            continue
        for kernel in ("gate_up", "down"):
            sizes = dataclasses.asdict(SHAPES[row["shape"]])
            facts = {"kernel": kernel, "tokens": row["tokens"], "format": f"int{match[1]}-g64"}
            yield {**sizes, **facts, "microseconds": row[f"{kernel}_us"]}


def main() -> None:
    name = sys.argv[1]
    found = records.shipped(name)
    if found is None:
        raise SystemExit(f"no records of {name}")
    source, rows = found.source, list(found.rows)
    if name == "sm_90":
        source += f"; int*-g64: benchmarks/results/{RESULTS.name}"
        rows += benched()
    path = FOLDER / f"{name}.json"
    known = json.loads(path.read_text())["matrices"] if path.is_file() else []
    times = {tuple(row[field] for field in FIELDS): row for row in known}
    for key, us in matrix_times(rows).items():
        times[key] = {**dict(zip(FIELDS, key, strict=True)), "microseconds": round(us, 4)}
    text = json.dumps({"schema": SCHEMA, "source": source, "matrices": list(times.values())}, indent=1)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
