"""Blocks that moqc states itself, and latent attention, against transformers' own code."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from moqc.errors import ModelError, UserError
from moqc.frontend.gate import random_model
from moqc.frontend.hooks import hook
from moqc.frontend.shrink import shrink
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.survey import example_config
from moqc.frontend.trace import outline
from moqc.inputs import context_length

TOLERANCE = 1e-5


def hooked_pair(model_type: str, **options: bool) -> tuple[Any, Any]:
    """A tiny eager model, and a hooked one with the same weights."""
    eager = random_model(shrink(example_config(model_type)))
    hooked = build_skeleton(eager.config)
    hooked.load_state_dict({name: tensor.clone() for name, tensor in eager.state_dict().items()}, assign=True)
    hooked.tie_weights()
    hook(hooked, **options)
    return eager, hooked


def logits(model: Any, length: int = 11) -> torch.Tensor:
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(
            input_ids=ids, position_ids=torch.arange(length)[None].expand(2, -1), use_cache=False
        ).logits


@pytest.mark.parametrize("model_type", ["minimax", "zaya", "jetmoe", "llama4_text", "deepseek_v32", "hy_v4"])
def test_restated_blocks_compute_the_same(model_type: str) -> None:
    eager, hooked = hooked_pair(model_type)
    torch.testing.assert_close(logits(hooked), logits(eager), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("model_type", ["deepseek_v2", "deepseek_v3", "kimi_linear", "dots3_note_text"])
def test_latents_compute_the_same(model_type: str) -> None:
    eager, hooked = hooked_pair(model_type, latent=True)
    torch.testing.assert_close(logits(hooked), logits(eager), atol=TOLERANCE, rtol=TOLERANCE)
    assert any(getattr(module, "moqc_latent", False) for module in hooked.modules())


def test_the_cache_holds_latents() -> None:
    config = transformers.AutoConfig.for_model("deepseek_v3")
    one = config.kv_lora_rank + config.qk_rope_head_dim
    assert {use.element_count for use in outline(config, latent=True).attention} == {one}
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    assert {use.element_count for use in outline(config).attention} == {heads}


def test_decays_of_the_gate_s_models_are_those_of_the_class() -> None:
    """Powers of a decay that are stored beside it cannot be random."""
    mixer = random_model(shrink(example_config("minimax"))).get_submodule("model.layers.1.self_attn")
    torch.testing.assert_close(mixer.query_decay, mixer.decay_factors(mixer.slope_rate)[0])


@pytest.fixture
def attention() -> Callable[..., Any]:
    model = hooked_pair("deepseek_v32")[1]
    module = model.get_submodule("model.layers.0.self_attn")
    forward = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["moqc"]
    q = torch.randn(1, 4, 5, 8)
    return lambda indices: forward(module, q, q, q, None, indices=indices)


def test_selected_tokens_are_refused_where_they_are_real(attention: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="uses indices, which moqc does not model"):
        attention(torch.zeros(1, 5, 2, dtype=torch.int32))


def test_contexts_end_where_tokens_would_be_selected() -> None:
    config = transformers.AutoConfig.for_model("deepseek_v32")
    assert context_length(config, None) == config.index_topk == 2048
    with pytest.raises(UserError, match="context 4096: must be 1 to 2048"):
        context_length(config, 4096)
