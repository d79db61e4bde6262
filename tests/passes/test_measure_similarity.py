"""measure-similarity: against hooks on the model as transformers runs it."""

from typing import Any

import pytest
import torch
import transformers
from tvm import IRModule

from moqc.ir.annotations import SIMILARITY
from moqc.passes.measure_similarity import MeasureSimilarity


def test_against_hooks_on_the_model(moe: IRModule, calibrated: Any) -> None:
    found = SIMILARITY.of(MeasureSimilarity()(moe, calibrated))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        calibrated.checkpoint.path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()
    before: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    after: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for index, layer in enumerate(model.model.layers):
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, index=index: before[index].append(args[0])
        )
        layer.register_forward_hook(lambda _, __, output, index=index: after[index].append(output))
    with torch.no_grad():
        for windows in calibrated.calibration.tokens:
            model(input_ids=torch.from_numpy(windows), use_cache=False)
    for index in (0, 1):
        cosines = torch.nn.functional.cosine_similarity(
            torch.cat(before[index]), torch.cat(after[index]), dim=-1
        )
        assert found[f"model.layers.{index}.mlp.experts"] == pytest.approx(
            float(cosines.mean()) * 1e6, abs=20
        )
