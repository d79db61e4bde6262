"""`moqc compare` over budgets and seeds, in parallel processes, merged into one result.

    python benchmarks/quality.py MODEL --folder DIR --cache DIR -o result.json

`--folder` holds NAME.test.txt and NAME.calib.txt of the four domains, the task files, and the unseen text. A
process computes one budget with one seed; they share the cache. The rows are those of

    moqc compare MODEL --bits B --seeds S --allocators PLANS --text ... --calib ... --unseen ... --json

On a GPU the work is bound by launches, so several processes on one device finish sooner than one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from moqc.evaluate.compare import Comparison, Row
from moqc.evaluate.summary import markdown

DOMAINS = ("en_novels", "fr_novels", "math", "multi_misc")
TASKS = ("arc_easy", "arc_challenge", "openbook_qa", "piqa", "winogrande")
ALL = (
    "uniform:rtn,uniform:gptq,frequency,block-importance,outlier-score,ewq,moqa,moqa:rtn,pmq,pmq:mcmoe,"
    "gemq,mxmoe,global"
)
MAIN = "uniform:gptq,moqa,pmq,pmq:mcmoe,global"


def command(options: argparse.Namespace, bits: str, seed: int, plans: str) -> list[str]:
    """One comparison."""
    folder = Path(options.folder)
    line = [sys.executable, "-m", "moqc", "compare", options.model, "--json", "--cache", options.cache]
    line += ["--bits", bits, "--seeds", str(seed), "--allocators", plans]
    line += ["--tokens", str(options.tokens), "--questions", str(options.questions)]
    for name in DOMAINS:
        line += ["--text", str(folder / f"{name}.test.txt"), "--calib", str(folder / f"{name}.calib.txt")]
    for name in options.unseen:
        line += ["--unseen", str(folder / name)]
    for name in TASKS:
        line += ["--task", str(folder / f"{name}.jsonl")]
    return [*line, "--problems", str(folder / "math.test.txt")]


def run(line: list[str]) -> Comparison | None:
    """The comparison a command prints, or None, with what it said, where it failed."""
    start = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    what = " ".join(line[line.index("--bits") : line.index("--allocators")])
    print(f"{what}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr, flush=True)
        return None
    content = json.loads(done.stdout)
    content["rows"] = tuple(Row(**row) for row in content["rows"])
    return Comparison(**content)


def main() -> None:
    """Run all comparisons and write the merged one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--bits", default="2.0,2.5,3.25")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--plans", default=ALL, help="of the first seed")
    parser.add_argument("--main-plans", default=MAIN, help="of the other seeds")
    parser.add_argument("--unseen", nargs="*", default=["stdlib.txt", "wikitext2.test.txt"])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--workers", type=int, default=9)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    lines = [
        command(options, bits, seed, options.plans if seed == seeds[0] else options.main_plans)
        for seed in seeds
        for bits in options.bits.split(",")
    ]
    with ThreadPoolExecutor(options.workers) as pool:
        parts = [part for part in pool.map(run, lines) if part is not None]
    if not parts:
        sys.exit(1)
    merged = parts[0].to_dict() | {"rows": tuple(row for part in parts for row in part.rows)}
    result = Comparison(**merged)
    Path(options.output).write_text(json.dumps(result.to_dict(), indent=1))
    print(markdown(result))
    if len(parts) < len(lines):
        sys.exit(1)


if __name__ == "__main__":
    main()
