from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

from moqc.errors import ModelError
from moqc.frontend.gate import random_model
from moqc.frontend.hooks import hook
from moqc.frontend.skeleton import build_skeleton

Config = Callable[..., transformers.PretrainedConfig]


def test_hooked_model_has_canonical_parameters(tiny_config: Config) -> None:
    model = build_skeleton(tiny_config("gpt_oss"))
    layouts = hook(model)
    names = dict(model.named_parameters())
    for layout in layouts:
        found = {operand: names[f"{layout.site}.{operand}"] for operand in layout.operands}
        assert {operand: tuple(tensor.shape) for operand, tensor in found.items()} == {
            operand: layout.shape(operand) for operand in layout.operands
        }
        assert all(tensor.is_meta for tensor in found.values())
    assert not [name for name in names if "gate_up_proj" in name]
    assert layouts[0].activation == "oai_swiglu(alpha=1.702,limit=7.0)"


def test_persistent_buffers_become_parameters(tiny_config: Config) -> None:
    model = build_skeleton(tiny_config("deepseek_v3"))
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert name in dict(model.named_buffers())
    hook(model)
    assert name in dict(model.named_parameters())
    assert name not in dict(model.named_buffers())


def test_computed_buffers_equal_those_of_a_real_model(tiny_config: Config) -> None:
    config = tiny_config("gpt_oss")
    expected = dict(transformers.AutoModelForCausalLM.from_config(config).named_buffers())
    found = dict(build_skeleton(config).named_buffers())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_skeleton_has_no_weights(tiny_config: Config) -> None:
    assert all(parameter.is_meta for parameter in build_skeleton(tiny_config("mixtral")).parameters())


@pytest.fixture
def attention(tiny_config: Config) -> Callable[..., Any]:
    """Calls the hooked attention of a layer with one more keyword."""
    model = random_model(tiny_config("qwen3_moe"))
    hook(model)
    module = model.get_submodule("model.layers.0.self_attn")
    forward = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["moqc"]

    def call(**keywords: Any) -> torch.Tensor:
        q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
        keywords = {"attention_mask": None, **keywords}
        return forward(module, q, k, k, **keywords)[0]

    return call


def test_spent_and_missing_tensors_are_fine(attention: Callable[..., torch.Tensor]) -> None:
    output = attention(position_ids=torch.arange(5)[None], position_bias=None, sliding_window=3)
    assert output.shape == (1, 5, 4, 8)


@pytest.mark.parametrize(
    ("keyword", "said"),
    [
        ("position_bias", r"a bias on its scores that depends on the tokens \(position_bias\)"),
        ("indices", "indices"),
        ("some_new_tensor", "some_new_tensor"),
        ("attention_mask", "a mask that it computes, none of transformers' causal, window and chunk masks"),
    ],
)
def test_unknown_tensors_are_refused(attention: Callable[..., torch.Tensor], keyword: str, said: str) -> None:
    with pytest.raises(ModelError, match=rf"layers\.0\.self_attn: Qwen3MoeAttention uses {said}, which"):
        attention(**{keyword: torch.zeros(1)})


def test_sinks_that_depend_on_the_input_are_refused(attention: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(ModelError, match="sinks that depend on the input"):
        attention(sinks=torch.zeros(1, 4, 5, 1))


def test_softcap_and_window_act(attention: Callable[..., torch.Tensor]) -> None:
    torch.manual_seed(0)
    plain = attention()
    for keywords in ({"softcap": 0.5}, {"sliding_window": 2}, {"is_causal": False}, {"s_aux": torch.ones(4)}):
        torch.manual_seed(0)
        assert not torch.allclose(attention(**keywords), plain)
