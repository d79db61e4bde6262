"""Make the table of kernel times that allocation reads, from the records of a search of plans.

    python benchmarks/kernel_costs.py sm_90 [MEASURED.json]
    python benchmarks/kernel_costs.py x86-64-v4-amx

Reads ``schedules/records/NAME.json`` and updates ``schedules/kernel_costs/NAME.json``: times of matrices
without records stay as they are. MEASURED.json, a list of records of today's kernels, replaces those of the
same kernels and formats first; records of whole layers stay, and decide. Of trellis formats only times are
kept: their kernels have the plans of integers of as many stored bits.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moqc.quant.formats import Format
from moqc.schedules import plan_records as records
from moqc.schedules.kernel_times import FOLDER, SCHEMA, matrix_times

FIELDS = ("rows", "columns", "format", "tokens")


def fold(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Records with `new` in the place of those measured before; the last one of a plan's key decides."""

    def key(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return (*(row[name] for name in records.KEY), row.get("format"))

    layers = {key(row): row for row in old if row.get("timed") == "layer"}
    rows = {key(row): row for row in (*old, *new)} | layers
    return [*(row for row in rows.values() if "timed" not in row), *layers.values()]


def main() -> None:
    name, *measured = sys.argv[1:]
    found = records.shipped(name)
    if found is None:
        raise SystemExit(f"no records of {name}")
    rows, trellises = found.rows, []
    if measured:
        new = json.loads(Path(measured[0]).read_text())
        trellises = [row for row in new if "format" in row and Format.parse(row["format"]).trellis]
        rows = fold(rows, [row for row in new if row not in trellises])
        content = {"schema": records.SCHEMA, "source": found.source, "records": rows}
        (records.FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    path = FOLDER / f"{name}.json"
    known = json.loads(path.read_text())["matrices"] if path.is_file() else []
    times = {tuple(row[field] for field in FIELDS): row for row in known}
    for key, us in matrix_times((*rows, *trellises)).items():
        times[key] = {**dict(zip(FIELDS, key, strict=True)), "microseconds": round(us, 4)}
    table = {"schema": SCHEMA, "source": found.source, "matrices": list(times.values())}
    path.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
