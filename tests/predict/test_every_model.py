"""`moqc plan` knows every supported architecture at its real size, in seconds."""

import time

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moqc
from moqc.frontend.survey import shipped

EXACT = [row.model_type for row in shipped().rows if row.status == "exact"]
LIMIT = 15  # seconds of CPU

# transformers' default configuration is the size of a model that was published, but for these.
_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
_BLOCKS = {"M": "mamba", "E": "moe", "*": "attention"}
_LFM2_ATTENTION = (2, 6, 10, 14, 18, 21)
REAL = {
    "dbrx": {
        "d_model": 6144,
        "n_heads": 48,
        "n_layers": 40,
        "vocab_size": 100352,
        "attn_config": {"rope_theta": 500000.0, "kv_n_heads": 8, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "deepseek_v2": {
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
    },
    "dots1": {
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 64, "moe_topk": 8},
    "lfm2_moe": {
        "num_hidden_layers": 24,
        "layer_types": ["full_attention" if n in _LFM2_ATTENTION else "conv" for n in range(24)],
    },
    "nemotron_h": {"layers_block_type": [_BLOCKS[letter] for letter in _NANO], "n_routed_experts": 128},
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXACT)
def test_real_size_in_seconds(model_type, tmp_path):
    CONFIG_MAPPING[model_type](dtype="bfloat16", **REAL.get(model_type, {})).save_pretrained(tmp_path)
    start = time.process_time()
    plan = moqc.plan(tmp_path, bits=3.0)
    assert time.process_time() - start < LIMIT
    assert plan.total_weights > 4e9
    beside = plan.chosen.file_bytes - plan.chosen.stored.parameter_bytes
    assert 0 < beside < 0.05 * plan.chosen.file_bytes  # library, manifest, headers
    assert 2.9 < plan.chosen.bits <= 3.0
