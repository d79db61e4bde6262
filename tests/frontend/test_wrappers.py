"""Language models inside multimodal checkpoints."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.config import parse_config
from moqc.frontend.hooks import hook
from moqc.frontend.shrink import shrink
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.survey import example_config
from moqc.frontend.trace import outline

VISION: dict[str, dict[str, Any]] = {
    "qwen3_5_moe": {
        "hidden_size": 16, "num_heads": 2, "depth": 1, "intermediate_size": 16, "out_hidden_size": 32,
        "num_position_embeddings": 16,
    },
    "llama4": {
        "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64,
        "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16, "image_size": 28,
    },
}  # fmt: skip


def save_wrapper(model_type: str, folder: Path) -> transformers.PreTrainedModel:
    """A tiny multimodal model with random weights, saved to `folder`."""
    text = shrink(example_config(f"{model_type}_text")).to_dict()
    config = CONFIG_MAPPING[model_type](text_config=text, vision_config=VISION[model_type])
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model


def loaded(checkpoint: Checkpoint) -> Any:
    """The hooked language model with the weights that `checkpoint` reads."""
    model = build_skeleton(checkpoint.config)
    state = {name: checkpoint.load(name) for name in checkpoint.names}
    model.load_state_dict(state, assign=True)
    hook(model)
    return model


@pytest.mark.parametrize("model_type", VISION)
def test_the_language_model_is_taken_out(
    tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = save_wrapper(model_type, tmp_path)
    with caplog.at_level(logging.INFO, "moqc"):
        checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.config.model_type == f"{model_type}_text"
    assert f"{model_type} is multimodal" in caplog.text
    assert "vis" in caplog.text  # names the vision tower
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).logits
        found = loaded(checkpoint)(input_ids=ids, position_ids=torch.arange(9)[None].expand(2, -1)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    layout = checkpoint.layouts[0]
    name = f"{layout.site}.down"
    assert torch.equal(checkpoint.load(name, 3), checkpoint.load(name)[3])
    assert outline(parse_config(tmp_path, "")).model_type == f"{model_type}_text"


def test_a_language_model_saved_alone_under_the_wrapper_s_type(tmp_path: Path) -> None:
    text = shrink(example_config("qwen3_5_moe_text"))
    model = transformers.AutoModelForCausalLM.from_config(text)
    model.save_pretrained(tmp_path)
    assert set(Checkpoint.open(tmp_path).names) == set(model.state_dict())


def test_a_text_part_without_a_class_is_refused(tmp_path: Path) -> None:
    CONFIG_MAPPING["qwen3_vl_moe"]().save_pretrained(tmp_path)
    with pytest.raises(
        ModelError, match=r"qwen3_vl_moe: .* no language model of its own .*qwen3_vl_moe_text"
    ):
        parse_config(tmp_path, "here")
