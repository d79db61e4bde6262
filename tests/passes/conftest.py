"""A toy mixture of experts in TVMScript, as the front end would leave it, and its weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tvm import IRModule

from moqc.ir.text import parse_module

MOE = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({"moqc.params": [
        "embed.weight", "router.weight", "q.weight", "q.bias",
        "mlp.experts.gate", "mlp.experts.up", "mlp.experts.down", "mlp.experts.down_bias"], "moqc.schema": 1})
    @R.function
    def main(
        input_ids: R.Tensor((batch, seq), "int64"),
        positions: R.Tensor((batch, seq), "int64"),
        embed: R.Tensor((40, 64), "float32"),
        router: R.Tensor((3, 64), "float32"),
        q: R.Tensor((64, 64), "float32"),
        q_bias: R.Tensor((64,), "float32"),
        gate: R.Tensor((3, 32, 64), "float32"),
        up: R.Tensor((3, 32, 64), "float32"),
        down: R.Tensor((3, 64, 32), "float32"),
        down_bias: R.Tensor((3, 64), "float32"),
    ):
        with R.dataflow():
            x = R.take(embed, input_ids, axis=0)
            flat = R.reshape(x, R.shape([batch * seq, 64]))
            router_t = R.permute_dims(router)
            scores = R.matmul(flat, router_t)
            probabilities = R.nn.softmax(scores)
            top = R.topk(probabilities, k=2, ret_type="both", dtype="int64")
            weights = top[0]
            ids = top[1]
            y = R.moqc.experts(
                flat, ids, weights, gate, up, down, down_bias,
                site="mlp.experts", activation="silu_glu", operands=["gate", "up", "down", "down_bias"])
            q_t = R.permute_dims(q)
            product = R.matmul(y, q_t)
            h = R.add(product, q_bias)
            embed_t = R.permute_dims(embed)
            logits = R.matmul(h, embed_t)
            R.output(logits)
        return logits
"""


@dataclass
class FakeCheckpoint:
    """Random weights by name, in bfloat16 as checkpoints store them; remembers what was read."""

    shapes: dict[str, tuple[int, ...]]
    read: list[str] = field(default_factory=list)

    def load(self, name: str, expert: int | None = None) -> torch.Tensor:
        self.read.append(name)
        generator = torch.Generator().manual_seed(sorted(self.shapes).index(name))
        return torch.randn(self.shapes[name], generator=generator).to(torch.bfloat16)


@pytest.fixture
def moe() -> IRModule:
    """Embedding (tied with the output), router, 3 experts 64 -> 32 -> 64 and a linear with biases."""
    return parse_module(MOE)


@pytest.fixture
def moe_text() -> str:
    """The text of `moe`, to vary."""
    return MOE


@pytest.fixture
def checkpoint(moe: IRModule) -> Any:
    """The weights of `moe`."""
    names = list(moe.attrs["moqc.params"])
    types = [parameter.ty for parameter in list(moe["main"].params)[2:]]
    shapes = {str(name): tuple(map(int, ty.shape)) for name, ty in zip(names, types, strict=True)}
    return FakeCheckpoint(shapes)


@pytest.fixture(scope="session")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A PassContext with a real random checkpoint (2 layers of 8 experts), two datasets and a workspace."""
    import numpy as np
    from small_models import make_config

    from moqc.calibrate.text import CalibrationSet
    from moqc.calibrate.workspace import Workspace
    from moqc.frontend.checkpoint import Checkpoint
    from moqc.frontend.gate import random_model
    from moqc.passes.base import PassContext

    folder = tmp_path_factory.mktemp("calibrated")
    random_model(make_config("qwen3_moe")).save_pretrained(folder / "model")
    generator = np.random.default_rng(0)
    texts = {name: generator.integers(3, 64, (rows, 12)) for name, rows in (("prose", 5), ("code", 3))}
    return PassContext(
        checkpoint=Checkpoint.open(folder / "model"),
        calibration=CalibrationSet.of(texts),
        workspace=Workspace(folder / "cache"),
    )
