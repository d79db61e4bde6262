"""A tiny configuration of the same architecture: small sizes, every switch as the user's model has it.

Which fields are sizes is known by name: transformers uses the same few words in all its configurations. What
is not listed here (activations, normalization of routing weights, biases, rotary type, scaling factors, tied
embeddings...) is kept.
"""

from __future__ import annotations

from typing import Any

import transformers

from moqc.errors import ModelError

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
    "sliding_window": WINDOW,
    "attention_chunk_size": WINDOW,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Kept when smaller: the difference between one and several is what matters.
_AT_MOST = {
    "num_experts_per_tok": 2,
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
_DROPPED = ("dtype", "torch_dtype", "architectures", "_name_or_path", "id2label", "label2id", "num_labels")


def shrink(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """A configuration of the class of `config` with the smallest sizes that still exercise its switches.

    A sliding window, where there is one, is `WINDOW` tokens. Raises ModelError when the class rejects it.
    """
    fields = {name: value for name, value in config.to_dict().items() if name not in _DROPPED}
    layers = _chosen_layers(config, fields)
    small = {name: _shrunk(name, value, fields, layers) for name, value in fields.items()}
    small["num_hidden_layers"] = len(layers)
    if small.get("num_key_value_heads") is not None:
        grouped = fields["num_key_value_heads"] != fields.get("num_attention_heads")
        small["num_key_value_heads"] = 2 if grouped else _SIZES["num_attention_heads"]
    try:
        return type(config).from_dict(small)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{config.model_type}: cannot make a small copy to verify: {error}") from error


def _shrunk(name: str, value: Any, fields: dict[str, Any], layers: list[int]) -> Any:
    """The small value of one field; None and values that are no plain sizes stay."""
    if isinstance(value, list) and len(value) == fields.get("num_hidden_layers"):
        return [value[index] for index in layers]
    if name == "mlp_only_layers" and isinstance(value, list):
        return [position for position, index in enumerate(layers) if index in value]
    if isinstance(value, bool) or not isinstance(value, int | list):
        return value
    if name in _AT_MOST and isinstance(value, int):
        return min(value, _AT_MOST[name])
    if name.endswith("_token_id"):
        return _SIZES.get(name, 0)
    if isinstance(value, list) or name not in _SIZES or (value == 0 and name != "vocab_size"):
        return value
    return _SIZES[name]


def _chosen_layers(config: transformers.PretrainedConfig, fields: dict[str, Any]) -> list[int]:
    """Indices of layers that together show every kind of layer, at least two where there are two."""
    total = int(config.num_hidden_layers)
    lists = [v for v in fields.values() if isinstance(v, list) and len(v) == total > 0]
    dense = fields.get("mlp_only_layers") or []
    step = fields.get("decoder_sparse_step") or 1
    kinds = [(tuple(str(v[index]) for v in lists), index in dense) for index in range(total)]
    wanted = [index for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    # Consecutive layers, so that rules by index (every second layer sparse, the first ones dense) hold.
    count = min(total, max(2, wanted[-1] + 1, 2 * step, (fields.get("first_k_dense_replace") and 2) or 2))
    return list(range(count)) if count <= _MAX_LAYERS else wanted
