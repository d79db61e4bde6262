"""What recalibrating the routers gains on quantized experts: agreement, loss and KL divergence.

    python benchmarks/router_recalibration.py MODEL --folder TEXTS --cache DIR --bits 2

TEXTS holds NAME.test.txt and NAME.calib.txt of the four domains. Experts are quantized as `moqc compile` does
by default, other matrices are as stored; calibration text and windows are those of `moqc compare`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from workers import DOMAINS

from moqc.calibrate.forward import experts_function
from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.quantize import quantize_experts
from moqc.calibrate.routers import recalibrate_routers
from moqc.calibrate.routing import PrunedExperts
from moqc.calibrate.store import ExpertStore
from moqc.calibrate.stream import split_batches
from moqc.evaluate.metrics import evaluation_windows
from moqc.evaluate.skip_scores import Tally
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.hf import import_model
from moqc.inputs import open_workspace, read_calibration
from moqc.ir.annotations import BITS
from moqc.ir.sites import find_linears
from moqc.passes.base import PassContext
from moqc.pipelines import Debug, Plan, allocation_pipeline, run_passes


def logits(model: LayeredModel, store: ExpertStore | None, batches: list[Tensor]) -> Iterator[Tensor]:
    """Of each batch, with experts of `store` (None: as stored)."""
    stream = model.start(batches)
    for index in range(model.layer_count):
        experts = experts_function(model, index, store, "float")
        with model.layer(index) as layer:
            layer.run(stream, experts)
    return model.logits(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cache", required=True)
    parser.add_argument("--bits", type=float, default=2.0)
    parser.add_argument("--tokens", type=int, default=8192, help="of each test file")
    parser.add_argument("--calib-tokens", type=int, default=32_768)
    parser.add_argument("--damping", type=float, nargs="+", default=[0.1, 1.0])
    options = parser.parse_args()
    checkpoint, workspace = Checkpoint.open(Path(options.model)), open_workspace(options.cache)
    files = [options.folder / f"{name}.calib.txt" for name in DOMAINS]
    calibration = read_calibration(checkpoint, files, options.calib_tokens, 0)
    ctx = PassContext(checkpoint=checkpoint, calibration=calibration, workspace=workspace)
    mod, plan = import_model(checkpoint), Plan.parse("global")
    chosen = BITS.of(run_passes(allocation_pipeline(plan, options.bits), mod, ctx, Debug()))
    store = quantize_experts(checkpoint, chosen, plan.quantizer, calibration, workspace, rotate=plan.rotates)
    routers = [site.site for site in find_linears(mod) if site.router]
    models = {"unquantized": None, "as quantized": LayeredModel(checkpoint)}
    for damping in options.damping:
        updates = recalibrate_routers(checkpoint, calibration, workspace, store, routers, damping=damping)
        for name, update in updates.items():
            print(f"damping {damping:g}: {name}: agreement {update.before:.4f} -> {update.after:.4f}")
        weights = {f"{name}.weight": update.weight.float() for name, update in updates.items()}
        models[f"recalibrated, damping {damping:g}"] = LayeredModel(checkpoint, override=weights.get)
    tests = [options.folder / f"{name}.test.txt" for name in DOMAINS]
    windows = evaluation_windows(tests, checkpoint.path / "tokenizer.json", tokens=options.tokens)
    score(checkpoint, store, models, windows)


def score(
    checkpoint: Checkpoint,
    store: ExpertStore,
    models: dict[str, LayeredModel | None],
    windows: Mapping[str, NDArray[np.int64]],
) -> None:
    """Print the losses of the unquantized model (None), and of others with experts of `store`."""
    owners = [number for number, rows in enumerate(windows.values()) for _ in rows]
    batches = split_batches(torch.from_numpy(np.concatenate(list(windows.values()))))
    streams = [
        logits(model or LayeredModel(checkpoint), None if model is None else store, batches)
        for model in models.values()
    ]
    tallies, row = [Tally() for _ in streams], 0
    for batch, *found in zip(batches, *streams, strict=True):
        for tally, scores in zip(tallies, found, strict=True):
            for at, window in enumerate(batch):
                tally.add(owners[row + at], window, scores[at], found[0][at])
        row += len(batch)
    for name, tally in zip(models, tallies, strict=True):
        one = tally.outcome(tallies[1], PrunedExperts({}, batches[0].shape[1]))
        print(
            f"{name}: loss {one.loss:.5f}, KL divergence {one.kld:.5f}, over as quantized "
            f"{one.increase:+.5f} +- {one.standard_error:.5f}"
        )


if __name__ == "__main__":
    main()
