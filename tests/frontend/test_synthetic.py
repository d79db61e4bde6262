"""Configurations by name and random weights."""

import json
from collections import Counter

import pytest
import torch

from moqc.errors import ModelError
from moqc.frontend.mapping import stored_tensors
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.synthetic import (
    SyntheticCheckpoint,
    random_weight,
    read_declared,
    shape_names,
    write_metadata,
)
from moqc.runtime.tokenizer import Tokenizer

# As counted from the files on the hub.
PARAMETERS = {
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "qwen3-30b-a3b": 30_532_122_624,
}
TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "layer_types": ["full_attention"] * 3,
}


def test_shapes_have_the_published_sizes(tmp_path):
    assert shape_names() == sorted(PARAMETERS)
    for name, count in PARAMETERS.items():
        config = write_metadata(tmp_path, read_declared(name), name)
        assert sum(tensor.numel() for tensor in stored_tensors(build_skeleton(config)).values()) == count


def test_declared_from_file_folder_and_name(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**TINY, "quantization_config": {"quant_method": "fp8"}}))
    assert read_declared(file) == read_declared(tmp_path) == TINY
    cut = read_declared(file, layers=2)
    assert (cut["num_hidden_layers"], cut["layer_types"]) == (2, ["full_attention"] * 2)
    assert read_declared("gpt-oss-20b", layers=1)["layer_types"] == ["sliding_attention"]
    with pytest.raises(ModelError, match="has 3 layers; it cannot be cut to 4"):
        read_declared(file, layers=4)
    with pytest.raises(ModelError, match=r"no such configuration; give .* mixtral-8x7b"):
        read_declared(tmp_path / "nothing.json")


def test_metadata_has_a_tokenizer_of_the_whole_vocabulary(tmp_path):
    write_metadata(tmp_path, TINY, "tiny")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    assert tokenizer.size == 300
    assert tokenizer.decode(tokenizer.encode("naïve 🦊")) == "naïve 🦊"
    assert len(tokenizer.encode("naïve")) == 6
    assert tokenizer.decode([299]) == "<299>"
    with pytest.raises(ModelError, match=r"tiny: transformers .* cannot read this configuration of nonsense"):
        write_metadata(tmp_path, {**TINY, "model_type": "nonsense"}, "tiny")


def test_weights_are_repeatable_and_sized(tmp_path):
    config = write_metadata(tmp_path, {**TINY, "tie_word_embeddings": True}, "tiny")
    checkpoint = SyntheticCheckpoint(tmp_path, config, "tiny", 7)
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    first, again = (checkpoint.load("model.layers.1.mlp.experts.up") for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == (4, 16, 32)
    assert torch.equal(checkpoint.load("model.layers.1.mlp.experts.up", 2), first[2])
    assert not torch.equal(checkpoint.load("model.layers.2.mlp.experts.up"), first)
    assert torch.equal(checkpoint.load("lm_head.weight"), checkpoint.load("model.embed_tokens.weight"))
    other = SyntheticCheckpoint(tmp_path, config, "tiny", 8)
    assert other.fingerprint != checkpoint.fingerprint
    assert not torch.equal(other.load("lm_head.weight"), checkpoint.load("lm_head.weight"))
    large = random_weight("lm_head.weight", (500, 400), config, 0)
    assert large.dtype == torch.bfloat16
    assert abs(large.float().std() - 0.02) < 2e-4
    assert Counter(random_weight("norm.weight", (3,), config, 0).tolist()) == {1.0: 3}
