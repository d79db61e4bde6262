"""Processes that plan, quantize and evaluate, for quality.py and ablation.py: what they share.

Models and quantizers run on a GPU where there is one, but for trellises and MC-MoE's quantizer, which would
be bound by its launches. Everything is cached, so the processes divide the work by what they ask for.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moqc import log
from moqc.calibrate import quantize
from moqc.calibrate.costs import measure_costs
from moqc.calibrate.gradients import measure_gradients
from moqc.calibrate.statistics import collect_statistics
from moqc.evaluate.bench import Bench
from moqc.evaluate.metrics import evaluation_windows
from moqc.evaluate.probes import ChoiceProbe, ExactProbe, Probe, TextProbe
from moqc.evaluate.tasks import multiple_choice, worked_problems
from moqc.frontend.checkpoint import Checkpoint
from moqc.inputs import open_workspace, read_calibration
from moqc.ir.sites import find_experts
from moqc.passes.allocate_bits import AllocateBits
from moqc.passes.base import PassContext
from moqc.passes.measure_costs import MeasureCosts
from moqc.passes.measure_gradients import MeasureGradients
from moqc.passes.pipeline import Pipeline
from moqc.passes.profile_activation import ProfileActivation
from moqc.passes.profile_channels import ProfileChannels
from moqc.passes.protect_channels import ProtectChannels
from moqc.passes.score_experts import ScoreExperts
from moqc.pipelines import Debug, run_passes
from moqc.quant.formats import Format
from moqc.quant.quantizers import STORABLE
from moqc.quant.tensor import Quantized

MADE_OF_OTHERS = (AllocateBits, ProfileActivation, ProtectChannels, ScoreExperts)
"""Passes that need no time once the others have measured."""
DOMAINS = ("en_novels", "fr_novels", "math", "multi_misc")
TASKS = ("arc_easy", "arc_challenge", "openbook_qa", "piqa", "winogrande")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what is evaluated."""
    parser.add_argument("model")
    parser.add_argument("--folder", required=True, help="texts, task files, unseen text")
    parser.add_argument("--cache", required=True)
    parser.add_argument("--unseen", nargs="*", default=["stdlib.txt", "wikitext2.test.txt"])
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--calib-tokens", type=int, default=32_768)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--trellis-threads", type=int, default=4)


def processes(options: argparse.Namespace) -> ProcessPoolExecutor:
    """A pool whose processes have the model open."""
    return ProcessPoolExecutor(
        options.workers,
        get_context("spawn"),
        initializer=_start,
        initargs=(vars(options) | {"gpus": torch.cuda.device_count()},),
    )


_OPTIONS: dict[str, Any] = {}


def _start(options: dict[str, Any]) -> None:
    """Each process computes on one of the GPUs, in turn."""
    if options["gpus"]:
        (number,) = current_process()._identity  # type: ignore[attr-defined]
        torch.cuda.set_device(number % options["gpus"])
        _trellises_on_cores()
    log.be_quiet()
    torch.set_num_threads(1)
    _OPTIONS.update(options)


def prepare(pool: ProcessPoolExecutor, wanted: Iterable[tuple[Pipeline, int]]) -> None:
    """Measure what the passes of all pipelines (each with its seed) read, every thing once.

    First what costs are made of, then costs, by format and layer, and everything else.
    """
    first: dict[tuple[str, int], None] = {}
    second: dict[tuple[str, int], None] = {}
    costs: dict[tuple[MeasureCosts, str, int], None] = {}
    for pipeline, seed in wanted:
        for item in pipeline.passes:
            alone = (str(Pipeline((item,))), seed)
            if isinstance(item, MeasureCosts):
                for name in item.formats:  # what is made of the errors afterwards needs no time
                    costs[replace(item, formats=(), prior=0.0, robustness=0.0), name, seed] = None
            elif isinstance(item, ProfileChannels | MeasureGradients):
                first[alone] = None
            elif not isinstance(item, MADE_OF_OTHERS):
                second[alone] = None
    start = time.monotonic()
    for done in [pool.submit(_reference), *(pool.submit(_measure, *one) for one in first)]:
        done.result()
    _say(start, "statistics and gradients")
    sites = pool.submit(_sites).result()
    trellis_first = sorted(costs, key=lambda key: "tcq" not in key[1])
    jobs = [pool.submit(_costs, *one, site) for one in trellis_first for site in sites]
    for done in [*(pool.submit(_measure, *one) for one in second), *jobs]:
        done.result()
    _say(start, "costs")


def _say(start: float, what: str) -> None:
    print(f"{time.monotonic() - start:.0f} s: {what} measured", file=sys.stderr, flush=True)


def _costs(item: MeasureCosts, name: str, seed: int, site: str) -> None:
    """Costs of one format at one site."""
    ctx, opened = context(seed), bench()
    assert ctx.calibration is not None
    sources = (opened.checkpoint, ctx.calibration, opened.workspace)
    statistics = collect_statistics(*sources)
    measure_costs(
        opened.checkpoint,
        replace(statistics, keys={site: statistics.keys[site]}),
        [Format.parse(name)],
        quantizer=item.quantizer,
        gradients=None if item.curvature == "block" else measure_gradients(*sources),
        by_token=item.curvature == "token",
        rotate=item.rotate,
        held_out=item.held_out,
    )


def _sites() -> list[str]:
    return [site.site for site in find_experts(bench().mod)]


def _reference() -> None:
    bench().measure(None, {})


def _measure(text: str, seed: int) -> None:
    run_passes(Pipeline.parse(text), bench().mod, context(seed), Debug())


def set_threads(trellis: bool) -> None:
    """One thread a process, and more for plans of trellises, which take the longest."""
    torch.set_num_threads(_OPTIONS["trellis_threads"] if trellis else 1)


def _trellises_on_cores() -> None:
    """What goes column after column without a fused kernel is bound by launches on a GPU."""
    for name, quantizer in STORABLE.items():
        together = quantizer.together and _on_cpu(quantizer.together)
        STORABLE[name] = replace(quantizer, run=_on_cpu(quantizer.run), together=together)
    quantize.quantize_mcmoe = _on_cpu(quantize.quantize_mcmoe)  # type: ignore[attr-defined]


def _on_cpu(quantizer: Callable[..., Any]) -> Callable[..., Any]:
    """The quantizer on the CPU but for integer formats; results go to where the matrices are."""

    def run(matrices: Tensor, hessian: Tensor | None, wanted: Any) -> Any:
        formats = wanted if isinstance(wanted, list) else [wanted]
        if all(isinstance(fmt, Format) and not fmt.trellis for fmt in formats):
            return quantizer(matrices, hessian, wanted)
        found = quantizer(matrices.cpu(), None if hessian is None else hessian.cpu(), wanted)
        return _moved(found, matrices.device)

    return run


def _moved(found: Any, device: torch.device) -> Any:
    """Tensors, and what is made of them, on `device`."""
    if isinstance(found, Tensor):
        return found.to(device)
    if isinstance(found, Quantized):
        parts = {name: _moved(getattr(found, name), device) for name in ("codes", "scales", "zeros")}
        return replace(found, **parts)
    return type(found)(_moved(one, device) for one in found) if isinstance(found, list | tuple) else found


@lru_cache
def bench() -> Bench:
    """The model with all probes."""
    checkpoint = Checkpoint.open(Path(_OPTIONS["model"]))
    return Bench.open(checkpoint, open_workspace(_OPTIONS["cache"]), _probes(checkpoint))


def _probes(checkpoint: Checkpoint) -> dict[str, Probe]:
    folder, tokenizer = Path(_OPTIONS["folder"]), checkpoint.path / "tokenizer.json"
    count, questions = _OPTIONS["tokens"], _OPTIONS["questions"]
    texts = [folder / f"{name}.test.txt" for name in DOMAINS]
    unseen = [folder / name for name in _OPTIONS["unseen"]]
    tasks = [folder / f"{name}.jsonl" for name in TASKS]
    return {
        "text": TextProbe(evaluation_windows(texts, tokenizer, tokens=count)),
        "unseen": TextProbe(evaluation_windows(unseen, tokenizer, tokens=count)),
        "choices": ChoiceProbe(multiple_choice(tasks, tokenizer, questions)),
        "exact": ExactProbe(worked_problems(folder / "math.test.txt", tokenizer, questions)),
    }


@lru_cache
def context(seed: int) -> PassContext:
    """What passes see, with the calibration text that `seed` draws."""
    opened, folder = bench(), Path(_OPTIONS["folder"])
    files = [folder / f"{name}.calib.txt" for name in DOMAINS]
    calibration = read_calibration(opened.checkpoint, files, _OPTIONS["calib_tokens"], seed)
    return PassContext(
        checkpoint=opened.checkpoint, calibration=calibration, workspace=opened.workspace, seed=seed
    )
