import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moqc.frontend.shrink import WINDOW, shrink
from moqc.frontend.skeleton import build_skeleton


@pytest.mark.parametrize("model_type", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_published_sizes_become_tiny(model_type: str) -> None:
    """The defaults of these classes are the sizes of the published models."""
    model = build_skeleton(shrink(CONFIG_MAPPING[model_type]()))
    assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert 2 <= model.config.num_hidden_layers <= 4


def test_switches_stay() -> None:
    config = CONFIG_MAPPING["deepseek_v3"](norm_topk_prob=False, routed_scaling_factor=1.5, q_lora_rank=None)
    small = shrink(config)
    assert (small.norm_topk_prob, small.routed_scaling_factor, small.q_lora_rank) == (False, 1.5, None)
    assert (small.n_group, small.topk_group, small.first_k_dense_replace) == (2, 1, 1)
    assert small.rope_parameters["rope_type"] == config.rope_parameters["rope_type"]


def test_windows_shrink_but_neither_appear_nor_vanish() -> None:
    assert shrink(transformers.MixtralConfig(sliding_window=4096)).sliding_window == WINDOW
    assert shrink(transformers.MixtralConfig(sliding_window=None)).sliding_window is None


def test_layer_kinds_are_all_kept() -> None:
    config = CONFIG_MAPPING["gpt_oss"]()
    assert (
        set(shrink(config).layer_types) == set(config.layer_types) == {"sliding_attention", "full_attention"}
    )


def test_rare_layers_are_picked_out_of_a_deep_model() -> None:
    config = CONFIG_MAPPING["qwen3_moe"](num_hidden_layers=30, mlp_only_layers=[20])
    small = shrink(config)
    assert small.num_hidden_layers == 2
    assert small.mlp_only_layers == [1]


def test_grouping_of_heads_is_kept() -> None:
    grouped = shrink(transformers.MixtralConfig(num_attention_heads=32, num_key_value_heads=8))
    assert (grouped.num_attention_heads, grouped.num_key_value_heads) == (4, 2)
    plain = shrink(transformers.MixtralConfig(num_attention_heads=32, num_key_value_heads=32))
    assert plain.num_key_value_heads == 4


def test_user_configuration_is_untouched() -> None:
    config = transformers.MixtralConfig()
    before = config.to_dict()
    shrink(config)
    assert config.to_dict() == before
