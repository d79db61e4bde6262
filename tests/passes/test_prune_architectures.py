"""Pruning of five architectures, compiled, against the rule applied to transformers' own eager code."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import tvm
from small_models import ARCHITECTURES, make_config
from tvm import relax

from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.routing import PrunedExperts
from moqc.calibrate.skipping import Skipping
from moqc.calibrate.text import CalibrationSet
from moqc.calibrate.workspace import ParamStore, Workspace
from moqc.codegen import build
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.gate import random_model
from moqc.frontend.hf import import_model
from moqc.ir.annotations import CACHE, PARAMS, PRUNING
from moqc.ir.verify import verify
from moqc.passes.base import PassContext
from moqc.passes.pipeline import Pipeline
from moqc.targets import find_target

RENORMALIZING = ("mixtral", "deepseek_v3", "gpt_oss")
"""Architectures in which the ratio rules scale what is left."""
CASES = [
    *((architecture, "mass") for architecture in ARCHITECTURES),
    ("mixtral", "odp"),
    ("deepseek_v3", "odp"),
    ("gpt_oss", "topk-threshold"),
]
SHARE = 0.3
LENGTHS = (14, 9, 4)
ALLOWED = 1e-5


class Compiled:
    """The compiled model with caches of its own; `step` runs tokens at positions."""

    def __init__(self, mod: Any, ctx: PassContext, checkpoint: Checkpoint) -> None:
        names = PARAMS.of(mod)
        arrays = [
            ctx.params.get(name) if name in ctx.params else checkpoint.load(name).float().numpy()
            for name in names
        ]
        self._weights = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        self._shapes = CACHE.of(mod)["tensors"]
        lowered = Pipeline.parse("legalize,schedule").run(mod, ctx)
        self._machine = relax.VirtualMachine(build(lowered, ctx.target), tvm.cpu())
        self.clear()

    def clear(self) -> None:
        self._caches = [tvm.runtime.tensor(np.zeros(shape, np.float32)) for shape in self._shapes]

    def step(self, ids: np.ndarray, positions: np.ndarray) -> np.ndarray:
        inputs = [tvm.runtime.tensor(np.ascontiguousarray(array, np.int64)) for array in (ids, positions)]
        return self._machine["main"](*inputs, self._weights, self._caches)[0].numpy()


def eager_logits(checkpoint: Checkpoint, prunings: Any, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits [n, vocabulary] of one sequence, experts pruned; and the share that was skipped."""
    model, pruned = LayeredModel(checkpoint), PrunedExperts(prunings, len(tokens))
    stream = model.start([torch.from_numpy(tokens[None])])
    for index in range(model.layer_count):
        with model.layer(index) as layer:
            layer.run(stream, pruned.around(model.original_experts(index)))
    return next(iter(model.logits(stream)))[0].numpy(), pruned.skipped


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected) / np.maximum(1, np.abs(expected))))


@pytest.mark.parametrize(("architecture", "rule"), CASES)
def test_the_compiled_rule_is_the_rule(tmp_path, architecture, rule):
    config = make_config(architecture, num_experts_per_tok=3)
    random_model(config).save_pretrained(tmp_path / "model")
    generator = np.random.default_rng(0)
    ctx = PassContext(
        target=find_target("native"),
        checkpoint=Checkpoint.open(tmp_path / "model"),
        calibration=CalibrationSet.of({"text": generator.integers(3, 64, (12, 16))}),
        workspace=Workspace(tmp_path / "cache"),
        params=ParamStore(tmp_path / "params"),
    )
    text = f"prune-routing{{rule={rule} share={SHARE}}},plan-cache{{context=32 batch=3 dtype=float32}}"
    mod = Pipeline.parse(text).run(import_model(ctx.checkpoint, max_batch=3, max_chunk=16), ctx)
    verify(mod)
    scaled = rule != "mass" and architecture in RENORMALIZING
    assert {entry["renormalize"] for entry in PRUNING.of(mod).values()} == {int(scaled)}
    prunings = Skipping.of(ctx.checkpoint, ctx.calibration, ctx.workspace).prunings(rule, SHARE)
    model = Compiled(mod, ctx, ctx.checkpoint)

    ids, positions = np.zeros((3, 16), np.int64), np.full((3, 16), -1)
    expected = []
    for row, length in enumerate(LENGTHS):
        ids[row, :length] = generator.integers(3, 64, length)
        positions[row, :length] = np.arange(length)
        expected.append(eager_logits(ctx.checkpoint, prunings, ids[row, :length]))
    assert 0.1 < expected[0][1] < 0.6
    logits = model.step(ids, positions)
    for row, (wanted, _) in enumerate(expected):
        assert difference(logits[row, : LENGTHS[row]], wanted) <= ALLOWED

    model.clear()
    for at in range(LENGTHS[0]):
        step = model.step(ids[:, at : at + 1], positions[:, at : at + 1])
        for row, (wanted, _) in enumerate(expected):
            if at < LENGTHS[row]:
                assert difference(step[row, 0], wanted[at]) <= ALLOWED
