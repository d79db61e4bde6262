"""Count the instructions a weight takes in the inner loop of aarch64's decoding, from the disassembly.

``python benchmarks/aarch64_instructions.py`` writes benchmarks/results/aarch64-instructions.json. The loop is
the one over groups in `moqc.schedules.cpu.tiles.row_products`: 16 rows of a packed matrix times one token of
int8 activations, everything included that is done in it (loads, unpacking, scales, prefetches, the loop).
It needs `aarch64-linux-gnu-objdump` (package binutils-aarch64-linux-gnu), no ARM machine.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import tvm

from moqc.quant.formats import ALL_FORMATS, ROW_TILE, Format
from moqc.schedules.cpu.emit import kernel, load, loop, store, symbol
from moqc.schedules.cpu.families import FAMILIES
from moqc.schedules.cpu.plan import RowsPlan
from moqc.schedules.cpu.tiles import Activations, Weights, row_products
from moqc.targets import Target, find_target

GROUPS = 8
FORMATS = [str(fmt) for fmt in ALL_FORMATS]
TARGETS = ("aarch64", "aarch64-i8mm", "aarch64-neon")
DOTS = re.compile(r"(su?dot|usdot|smlal2?|smull2?)$")
LINE = re.compile(r"^\s*([0-9a-f]+):\s+[0-9a-f]+\s+([a-z][\w.]*)\s*(.*)$")


@dataclass(frozen=True)
class Count:
    """Of a loop's body: instructions, loads from memory and products, and instructions a weight.

    `product` is the instruction that most products are.
    """

    instructions: int
    loads: int
    products: int
    product: str
    weights: int
    per_weight: float


def count(target: Target, fmt: Format) -> Count:
    """Compile the product of 16 rows with one token, and count its loop."""
    lines = disassemble(target, fmt)
    first, last = inner_loop(lines)
    body = [name for _, name, _ in lines[first : last + 1]]
    products = [name for name in body if DOTS.match(name)]
    # A dot product is of 16 weights; without them a product is of 8, and wide codes take two.
    each = 16 if FAMILIES[target.dot].name != "neon" else 4 if fmt.wide else 8
    weights = len(products) * each
    if weights == 0 or weights % (fmt.group * ROW_TILE):
        raise SystemExit(f"{target.name} {fmt}: the loop found has {len(products)} products, no whole groups")
    loads = sum(name.startswith(("ld", "prf")) for name in body)
    product = Counter(products).most_common(1)[0][0]
    return Count(len(body), loads, len(products), product, weights, round(len(body) / weights, 4))


def disassemble(target: Target, fmt: Format) -> list[tuple[int, str, str]]:
    """(address, name, operands) of every instruction."""
    family, columns = FAMILIES[target.dot], fmt.group * GROUPS
    with kernel("rows") as k:
        x = Activations.declare(k, "int8", symbol("m"), columns)
        weights = Weights.declare(k, "", fmt, symbol("b"), columns)
        y = k.parameter("y", [symbol("b2"), ROW_TILE], "float32")
        with loop(0, y.shape[0]) as block:
            (totals,) = row_products(family, weights.block(0, block), x, [block], RowsPlan())
            for half, total in enumerate(totals):
                value = load(total, [0], f"float32x{family.lanes}")
                store(y, [block, half * family.lanes], value)
    function = k.finish().with_attr("global_symbol", "rows").without_attr("is_private")
    library = tvm.compile(tvm.IRModule({"rows": function}), target=tvm.target.Target(target.tvm))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.o")
        library.mod.write_to_file(str(path))
        command = ["aarch64-linux-gnu-objdump", "-d", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = (LINE.match(line) for line in text.splitlines())
    return [(int(m[1], 16), m[2], m[3]) for m in found if m]


def inner_loop(lines: list[tuple[int, str, str]]) -> tuple[int, int]:
    """First and last line of the innermost loop with products: the shortest backward branch over any."""
    place = {address: number for number, (address, _, _) in enumerate(lines)}
    loops = []
    for number, (_, name, operands) in enumerate(lines):
        goal = re.search(r"\b([0-9a-f]+) <", operands)
        if goal is None or not name.startswith(("b.", "cb", "tb", "b")) or name == "bl":
            continue
        start = place.get(int(goal[1], 16), number + 1)
        if start <= number and any(DOTS.match(each) for _, each, _ in lines[start:number]):
            loops.append((start, number))
    if not loops:
        raise SystemExit("no loop with products in the disassembly")
    return min(loops, key=lambda pair: pair[1] - pair[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", default="benchmarks/results/aarch64-instructions.json")
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    names = options.formats.split(",")
    found = {
        target: {name: asdict(count(find_target(target), Format.parse(name))) for name in names}
        for target in TARGETS
    }
    command = "python benchmarks/aarch64_instructions.py"
    content = {"command": command, "tvm": tvm.__version__, "targets": found}
    Path(options.output).write_text(json.dumps(content, indent=1) + "\n")
    for target, counts in found.items():
        for name, each in counts.items():
            print(f"{target:14}{name:16}{each['per_weight']:8.4f}{each['loads'] / each['weights']:8.4f}")


if __name__ == "__main__":
    main()
