"""Tiny configurations of five architectures that differ in all that matters to routing and attention."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_COMMON: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "num_key_value_heads": 4},
    "mixtral": {"num_local_experts": 8, "sliding_window": 4},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 8,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "gpt_oss": {"num_local_experts": 8, "head_dim": 8, "sliding_window": 4},
}


def make_config(model_type: str, **changes: Any) -> transformers.PretrainedConfig:
    """A tiny configuration of `model_type`, one of `ARCHITECTURES` or another."""
    fields = {**_COMMON, **ARCHITECTURES.get(model_type, {}), **changes}
    return CONFIG_MAPPING[model_type](**fields)
