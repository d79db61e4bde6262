"""Small random checkpoints of five architectures, and their models as transformers itself runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_models import make_config
from torch import Tensor

from moqc.calibrate.text import CalibrationSet
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.experts import is_experts
from moqc.frontend.gate import random_model

VOCABULARY, WINDOW = 64, 12


@dataclass(frozen=True)
class Small:
    """A checkpoint on disk and the transformers model it holds."""

    checkpoint: Checkpoint
    model: transformers.PreTrainedModel

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """The model's own eager forward."""
        return self.model(input_ids=tokens, use_cache=False).logits

    @torch.no_grad()
    def expert_inputs(self, tokens: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Site -> (x [T, H], ids [T, k], weights [T, k]), caught by hooks on the model."""
        caught: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        handles = []
        for name, module in self.model.named_modules():
            if is_experts(module):

                def keep(_: Any, args: Any, kwargs: Any, name: str = name) -> None:
                    x, ids, weights = (*args, *kwargs.values())
                    caught[name] = (x.reshape(-1, x.shape[-1]), ids, weights)

                handles.append(module.register_forward_pre_hook(keep, with_kwargs=True))
        self.logits(tokens)
        for handle in handles:
            handle.remove()
        return caught


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Small]:
    """``small(model_type, **changes)``: a small random model, saved and opened."""

    def make(model_type: str = "qwen3_moe", **changes: Any) -> Small:
        model = random_model(make_config(model_type, **changes)).eval()
        model.set_experts_implementation("eager")
        model.save_pretrained(tmp_path / "model")
        return Small(Checkpoint.open(tmp_path / "model"), model)

    return make


@pytest.fixture
def calibration() -> CalibrationSet:
    """Two datasets, of 5 and 3 windows."""
    generator = np.random.default_rng(0)
    sizes = {"prose": 5, "code": 3}
    return CalibrationSet.of(
        {name: generator.integers(3, VOCABULARY, (rows, WINDOW)) for name, rows in sizes.items()}
    )


@pytest.fixture
def tokens(calibration: CalibrationSet) -> Tensor:
    """All windows of `calibration`, int64 [8, 12]."""
    return torch.from_numpy(np.concatenate(calibration.tokens))
