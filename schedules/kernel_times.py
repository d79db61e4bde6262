"""Time of a packed matrix in a kernel, for allocation under a budget of time.

A target's table is ``schedules/kernel_costs/NAME.json``, `NAME` its GPU architecture, or its own name:

    {"schema": 2, "source": "how it was measured",
     "matrices": [{"rows": 768, "columns": 2048, "format": "int3-g128", "tokens": 1, "microseconds": 1.9},
                  ...]}

`microseconds`: what the matrix adds to the time of a call with so many tokens where its expert is hit, its
share of launches included. ``benchmarks/kernel_costs.py`` makes it of the records of a search; those of the
user's own (`Target.records`) come before. A matrix that is not in the table takes the longer of the two
times of the target's roofline, bytes over bandwidth and weights over the rate of the kernels. That is the
rate of integers; trellis formats take longer, by how much only a measurement tells (`binding`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moqc.errors import TargetError
from moqc.quant.formats import Format
from moqc.schedules.plan_records import read
from moqc.targets import Roofline, Target

FOLDER = Path(__file__).parent / "kernel_costs"
SCHEMA = 2


@dataclass(frozen=True)
class KernelTimes:
    """Measured times by (rows, columns, format, tokens), and the roofline for what was not measured."""

    machine: Roofline | None
    measured: Mapping[tuple[int, int, str, int], float]
    source: str = ""
    """Of `measured`."""

    def microseconds(self, rows: int, columns: int, fmt: Format, tokens: int = 1) -> float:
        """Time of one matrix. Raises TargetError where neither a measurement nor a roofline is known."""
        found = self.measured.get((rows, columns, str(fmt), tokens))
        if found is not None:
            return found
        if self.machine is None:
            raise TargetError(
                f"no time is known of a {rows} x {columns} matrix in {fmt}, and no roofline of the target: "
                "measure it for schedules/kernel_costs, or give no budget of time"
            )
        memory = fmt.stored_bits(rows, columns) / 8 / self.machine.bandwidth
        return 1e6 * max(memory, rows * columns / self.machine.weight_rate)

    def binding(self, rows: int, columns: int, fmt: Format) -> float:
        """Microseconds of one matrix and 1 token, for a budget of time.

        Raises TargetError likewise, and for trellis formats that were not measured.
        """
        if fmt.trellis and (rows, columns, str(fmt), 1) not in self.measured:
            raise TargetError(
                f"no time is known of a {rows} x {columns} matrix in {fmt}, which takes longer than the "
                "roofline of integers: measure it for schedules/kernel_costs, or give no budget of time"
            )
        return self.microseconds(rows, columns, fmt)

    def between(self, rows: int, columns: int, bits: float, tokens: int = 1) -> float | None:
        """Microseconds of a matrix of `bits` file bits a weight, interpolated between measured formats.

        A format is as fast as any measured one of more bits; trellis formats do not count. None where `bits`
        are out of their range.
        """
        measured = [
            (Format.parse(name), microseconds)
            for (*shape, name, count), microseconds in self.measured.items()
            if (*shape, count) == (rows, columns, tokens)
        ]
        points = sorted(
            (fmt.stored_bits(rows, columns) / (rows * columns), microseconds)
            for fmt, microseconds in measured
            if not fmt.trellis
        )
        if not points or not points[0][0] <= bits <= points[-1][0]:
            return None
        sizes, found = np.array(points).T
        return float(np.interp(bits, sizes, np.minimum.accumulate(found[::-1])[::-1]))


Key = tuple[int, int, str, int]


def matrix_times(rows: Iterable[Mapping[str, Any]]) -> dict[Key, float]:
    """Microseconds by (rows, columns, format, tokens), from records of a single format.

    A call serves the matrices of all experts hit; each gets an equal share.
    """
    found: dict[Key, float] = {}
    for row in rows:
        if "format" not in row:
            continue
        hit = row["experts"] * (1 - (1 - row["top_k"] / row["experts"]) ** row["tokens"])
        first = row["kernel"] == "gate_up"
        sizes = (row["intermediate"], row["hidden"]) if first else (row["hidden"], row["intermediate"])
        key = (*sizes, str(Format.parse(row["format"])), int(row["tokens"]))
        found[key] = row["microseconds"] / hit / (2 if first else 1)
    return found


def kernel_times(target: Target, folder: Path = FOLDER) -> KernelTimes:
    """The times of a target's kernels. Raises TargetError for a table that is damaged."""
    name = target.architectures[0] if len(target.architectures) == 1 else target.name
    path = folder / f"{name}.json"
    own = {} if target.records is None else matrix_times(read(Path(target.records)).rows)
    if not path.is_file():
        return KernelTimes(target.roofline, own)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise TargetError(f"{path}: schema {content['schema']}, and this moqc reads {SCHEMA}")
        rows = {}
        for row in content["matrices"]:
            fmt, tokens = str(Format.parse(row["format"])), int(row["tokens"])
            key = (int(row["rows"]), int(row["columns"]), fmt, tokens)
            rows[key] = float(row["microseconds"])
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise TargetError(f"{path}: not a table of kernel times ({type(error).__name__}: {error})") from error
    return KernelTimes(target.roofline, rows | own, str(content["source"]))
