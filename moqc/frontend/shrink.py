"""A tiny configuration of the same architecture: small sizes, every switch as the user's model has it.

Which fields are sizes is known by name: transformers uses the same few words in all its configurations. What
is not listed here (activations, normalization of routing weights, biases, rotary type, scaling factors, tied
embeddings...) is kept.
"""

from __future__ import annotations

from typing import Any

import transformers

from moqc.errors import ModelError
from moqc.frontend.skeleton import CONFIG_ERRORS, first_line

WINDOW = 4
_MAX_LAYERS = 8

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "num_attention_heads": 4,
    "head_dim": 8,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "dense_intermediate_size": 48,
    "prefix_dense_intermediate_size": 48,
    "q_lora_rank": 16,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "rotary_dim": 8,
    "max_position_embeddings": 256,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "max_seq_len": 256,
    "ffn_hidden_size": 48,
    "expert_ffn_hidden_size": 16,
    "intermediate_size_mlp": 48,
    "router_hidden_size": 16,
    "zero_expert_num": 4,
    "kv_channels": 8,
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "floor_scale": WINDOW,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # More than the gate's longest sequence: moqc computes the attention that selects every token.
    "index_topk": 64,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_dt_rank": 8,
    "mamba_chunk_size": WINDOW,
    "ssm_state_size": 8,
    "chunk_size": WINDOW,
    "block_size": WINDOW,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # A state of few keys makes the tiny model too sensitive to rounding to be compared.
    "linear_head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Kept when smaller: the difference between one and several is what matters.
_AT_MOST = {
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_top_k": 2,
    "num_expert_group": 2,
    "n_groups": 2,
    "mamba_n_groups": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_layer_start_index": 1,
    "num_nextn_predict_layers": 0,
    "max_window_layers": 1,
}
_SECTIONS = [2, 1, 1]
# Fields that hold fields, and lists of the numbers of layers.
_NESTED = ("attn_config", "ffn_config")
_LAYER_NUMBERS = ("mlp_only_layers", "moe_layers")
_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
_DROPPED = ("dtype", "torch_dtype", "architectures", "_name_or_path", "id2label", "label2id", "num_labels")


def shrink(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """A configuration of the class of `config` with the smallest sizes that still exercise its switches.

    A sliding window, where there is one, is `WINDOW` tokens. Raises ModelError when the class rejects it.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in _DROPPED}
    # Some classes have names of their own for the usual sizes: theirs -> the usual one.
    usual = {own: name for name, own in config.attribute_map.items()}
    layers = _chosen_layers(config, fields)
    small = {
        name: _shrunk(usual.get(name, name), value, config.num_hidden_layers, layers)
        for name, value in fields.items()
    }
    small[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(layers)
    heads = config.attribute_map.get("num_attention_heads", "num_attention_heads")
    _shrink_key_heads(small, fields, heads)
    _shrink_rotation(small, small.get("rope_parameters"))
    try:
        return type(config).from_dict(small)
    except CONFIG_ERRORS as error:
        raise ModelError(
            f"{config.model_type}: cannot make a small copy to verify: {first_line(error)}"
        ) from error


def _shrunk(name: str, value: Any, total: int, layers: list[int]) -> Any:
    """The small value of one field; None and values that are no plain sizes stay."""
    if name == "per_layer_config" and isinstance(value, dict):  # layer number, as text -> its own fields
        own = {int(key): fields for key, fields in value.items()}
        kept = {str(position): own[index] for position, index in enumerate(layers) if index in own}
        return {position: _shrunk_layer(fields, total, layers) for position, fields in kept.items()}
    if isinstance(value, dict) and name in _NESTED:
        return {key: _shrunk(key, item, total, layers) for key, item in value.items() if key not in _DROPPED}
    if name in _LAYER_NUMBERS and isinstance(value, list):
        return [position for position, index in enumerate(layers) if index in value]
    if isinstance(value, list) and len(value) == total:
        return [value[index] for index in layers]
    if isinstance(value, bool) or not isinstance(value, int | list):
        return value
    if name in _AT_MOST and isinstance(value, int):
        return min(value, _AT_MOST[name])
    if name.endswith("_token_id"):
        return _SIZES.get(name, 0)
    if isinstance(value, list) or name not in _SIZES or (value == 0 and name != "vocab_size"):
        return value
    return _SIZES[name]


def _shrunk_layer(fields: dict[str, Any], total: int, layers: list[int]) -> dict[str, Any]:
    """The fields that one layer has for itself."""
    small = {name: _shrunk(name, value, total, layers) for name, value in fields.items()}
    _shrink_key_heads(small, fields, "num_attention_heads")
    return small


def _shrink_key_heads(small: dict[str, Any], fields: dict[str, Any], heads: str) -> None:
    """As many key heads as query heads, or half as many, as it is in `fields`."""
    if small.get("num_key_value_heads") is not None:
        grouped = fields["num_key_value_heads"] != fields.get(heads)
        small["num_key_value_heads"] = 2 if grouped else _SIZES["num_attention_heads"]


def _shrink_rotation(small: dict[str, Any], rope: Any) -> None:
    """Where angles are in sections (time, height, width), or of latent heads: as many as sections."""
    latent = "qk_rope_head_dim" in small
    if not isinstance(rope, dict) or not (latent or "mrope_section" in rope):
        return
    if "mrope_section" in rope:
        rope["mrope_section"] = _SECTIONS
    kinds = [rope, *(kind for kind in rope.values() if latent and isinstance(kind, dict))]
    share = next((kind["partial_rotary_factor"] for kind in kinds if kind.get("partial_rotary_factor")), None)
    if share is None or "head_dim" not in small:
        return
    small["head_dim"] = int(2 * sum(_SECTIONS) / share)
    for own in (small.get("per_layer_config") or {}).values():
        if latent and "qk_nope_head_dim" in own:  # the rest of the head
            own["qk_nope_head_dim"] = small["head_dim"] - small["qk_rope_head_dim"]


def _chosen_layers(config: transformers.PretrainedConfig, fields: dict[str, Any]) -> list[int]:
    """Indices of layers that together show every kind of layer, at least two where there are two."""
    total = int(config.num_hidden_layers)
    # What a layer is may be a field, or a property that the class computes from other fields.
    named = {name: value for name, value in fields.items() if name not in _LAYER_NUMBERS}
    named |= {name: getattr(config, name, None) for name in _KINDS}
    lists = [value for value in named.values() if isinstance(value, list) and len(value) == total > 0]
    numbers = [value for name in _LAYER_NUMBERS if isinstance(value := fields.get(name), list)]
    kinds = [
        (tuple(str(values[index]) for values in lists), tuple(index in chosen for chosen in numbers))
        for index in range(total)
    ]
    wanted = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    # Consecutive layers, so that rules by index (every second layer sparse, the first ones dense) hold.
    step = fields.get("decoder_sparse_step") or fields.get("expert_layer_period") or 1
    count = min(total, max(2, wanted[-1] + 1, 2 * step, (fields.get("first_k_dense_replace") and 2) or 2))
    return list(range(count)) if count <= _MAX_LAYERS else wanted
