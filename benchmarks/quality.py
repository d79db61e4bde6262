"""`moqc compare` over budgets and seeds by many processes, merged into one result.

    python benchmarks/quality.py MODEL --folder DIR --cache DIR -o result.json

`--folder` holds NAME.test.txt and NAME.calib.txt of the four domains, the task files, and the unseen text.
The rows, and their cache, are those of

    moqc compare MODEL --bits B,... --seeds S,... --allocators PLANS --text ... --calib ... --unseen ...

The result is written after every row.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import as_completed
from dataclasses import dataclass, replace

from workers import add_options, bench, context, prepare, processes, set_threads

from moqc.errors import BudgetError
from moqc.evaluate.compare import Budget, Comparison, compare_plans, keep, plan_pipeline
from moqc.evaluate.summary import markdown
from moqc.passes.pipeline import Pipeline
from moqc.pipelines import DEFAULT_CANDIDATES, Plan

ALL = (
    "global,pmq:mcmoe,pmq,moqa,uniform:gptq,uniform:rtn,frequency,mxmoe,gemq,block-importance,outlier-score,"
    "ewq,moqa:rtn"
)
MAIN = "global,pmq:mcmoe,pmq,moqa,uniform:gptq"


@dataclass(frozen=True)
class Job:
    """One row."""

    plan: str
    budget: Budget
    seed: int
    formats: str = DEFAULT_CANDIDATES

    @property
    def pipeline(self) -> Pipeline:
        """The passes up to the choice of bits."""
        return plan_pipeline(Plan.parse(self.plan), self.budget, self.formats)


def evaluate(job: Job) -> Comparison | None:
    """The comparison of one row; None where the budget is out of the plan's reach."""
    try:
        set_threads("tcq" in str(job.pipeline))
        plan = (job.plan, Plan.parse(job.plan))
        return compare_plans(
            {job.seed: context(job.seed)}, bench(), [plan], [job.budget], formats=job.formats
        )
    except BudgetError as error:
        print(f"{job.plan} at {job.budget}: {error}", file=sys.stderr, flush=True)
        return None


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """All rows asked for."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    budgets = [Budget(float(bits)) for bits in options.bits.split(",") if bits]
    found = [
        Job(plan, budget, seed, options.formats)
        for seed in seeds
        for budget in budgets
        for plan in (options.plans if seed == seeds[0] else options.main_plans).split(",")
    ]
    wholes = [Budget(float(bits), whole=True) for bits in options.model_bits.split(",") if bits]
    return found + [Job("global", budget, seed) for budget in wholes for seed in seeds]


def main() -> None:
    """Run all rows and write the merged result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    parser.add_argument("-o", "--output", required=True)
    parser.add_argument("--bits", default="2.0,2.5,3.25")
    parser.add_argument("--model-bits", default="3.0")
    parser.add_argument("--formats", default=DEFAULT_CANDIDATES)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--plans", default=ALL, help="of the first seed")
    parser.add_argument("--main-plans", default=MAIN, help="of the other seeds")
    options = parser.parse_args()
    jobs, write, start = jobs_of(options), keep(options.output), time.monotonic()
    merged: Comparison | None = None
    with processes(options) as pool:
        prepare(pool, [(job.pipeline, job.seed) for job in jobs])
        for done in as_completed([pool.submit(evaluate, job) for job in jobs]):
            part = done.result()
            if part is None:
                continue
            merged = part if merged is None else replace(merged, rows=(*merged.rows, *part.rows))
            write(merged)
            (row,) = part.rows
            seconds = time.monotonic() - start
            print(
                f"{seconds:.0f} s: {row.plan} {row.target_bits} seed {row.seed}: {row.loss_increase:+.4f} "
                f"unseen {row.increases}",
                file=sys.stderr,
                flush=True,
            )
    if merged is None:
        sys.exit(1)
    order = {(job.plan, job.budget.bits, job.budget.whole, job.seed): at for at, job in enumerate(jobs)}
    rows = sorted(merged.rows, key=lambda r: order[r.plan, r.target_bits, r.whole, r.seed])
    merged = replace(merged, rows=tuple(rows))
    write(merged)
    print(markdown(merged))


if __name__ == "__main__":
    main()
