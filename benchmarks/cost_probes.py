"""How far costs are from what quantizing does: one projection of one layer in 2 bits, everything else in 8.

    python benchmarks/cost_probes.py MODEL --folder DIR --cache DIR

`--folder` as for quality.py. For each group of units (one projection of all experts of a layer), quantized by
gptq: the KL divergence from the unquantized model on the four domains, the increase of the loss, and the KL
divergence over the sum of the group's costs: of gptq, of gptq on tokens held out, and of rounding to nearest.
Costs that rank groups as they are would have the same ratio in every row.
"""

from __future__ import annotations

import argparse
from concurrent.futures import as_completed

from workers import add_options, bench, context, prepare, processes

from moqc.calibrate.costs import measure_costs
from moqc.calibrate.forward import reference_logits
from moqc.calibrate.gradients import measure_gradients
from moqc.calibrate.quantize import Plan, quantize_experts
from moqc.calibrate.statistics import collect_statistics
from moqc.calibrate.store import ExpertStore
from moqc.ir.sites import find_experts
from moqc.passes.pipeline import Pipeline
from moqc.quant.formats import Format

GROUP, REST = "int2-g128-sym-s8", "int8-g128-sym"
WAYS: dict[str, tuple[str, bool]] = {
    "gptq": ("gptq", False),
    "gptq, held out": ("gptq", True),
    "rtn": ("rtn", False),
}


def costs(site: str, projection: str, way: str) -> float:
    """Summed costs of a group in nats a token."""
    ctx, opened = context(0), bench()
    assert ctx.calibration is not None
    sources = (opened.checkpoint, ctx.calibration, opened.workspace)
    quantizer, held_out = WAYS[way]
    found = measure_costs(
        opened.checkpoint,
        collect_statistics(*sources),
        [Format.parse(GROUP)],
        quantizer=quantizer,
        gradients=measure_gradients(*sources),
        rotate=True,
        held_out=held_out,
    )
    rows = found[site][projection][GROUP]["datasets"]
    return 0.5 * sum(map(sum, rows)) / len(rows)


def divergence(store: ExpertStore) -> float:
    """Mean KL divergence of a prediction from the unquantized model's, in nats, on the four domains."""
    opened = bench()
    batches, total, count = opened.probes["text"].batches, 0.0, 0
    pairs = zip(
        reference_logits(opened.checkpoint, batches),
        reference_logits(opened.checkpoint, batches, store),
        strict=True,
    )
    for reference, logits in pairs:
        for p, q in zip(reference[:, :-1], logits[:, :-1], strict=True):
            log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
            total += float((log_p.exp() * (log_p - log_q)).sum())
            count += len(p)
    return total / count


def measure(site: str, projection: str) -> tuple[float, float]:
    """KL divergence and increase of the loss with one group in 2 bits; of none for an empty `site`."""
    ctx, opened = context(0), bench()
    plan: Plan = {
        block.site: {
            name: [GROUP if (block.site, name) == (site, projection) else REST] * block.experts
            for name in block.projections
        }
        for block in find_experts(opened.mod)
    }
    store = quantize_experts(opened.checkpoint, plan, "gptq", ctx.calibration, opened.workspace, rotate=True)
    losses = [opened.measure(one, {})["text"]["loss"] for one in (None, store)]
    return divergence(store), losses[1] - losses[0]


def groups() -> list[tuple[str, str]]:
    """(site, projection) of all groups."""
    return [(block.site, name) for block in find_experts(bench().mod) for name in block.projections]


def main() -> None:
    """Print a Markdown table, rows as they are done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_options(parser)
    options = parser.parse_args()
    passes = [
        f"profile-channels,measure-gradients,measure-costs{{quantizer={quantizer} formats={GROUP} "
        f"curvature=expert rotate=true held_out={str(held_out).lower()}}}"
        for quantizer, held_out in WAYS.values()
    ]
    columns = ["layer", "projection", "KL divergence", "increase", *(f"KL / {way}" for way in WAYS)]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    with processes(options) as pool:
        prepare(pool, [(Pipeline.parse(text), 0) for text in passes])
        rest, increase = pool.submit(measure, "", "").result()
        jobs = {pool.submit(measure, *group): group for group in pool.submit(groups).result()}
        for done in as_completed(jobs):
            site, projection = jobs[done]
            kl, loss = done.result()
            ratios = [(kl - rest) / pool.submit(costs, site, projection, way).result() for way in WAYS]
            cells = [f"{kl - rest:.5f}", f"{loss - increase:.5f}", *(f"{ratio:.2f}" for ratio in ratios)]
            print(f"| {' | '.join([site, projection, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
