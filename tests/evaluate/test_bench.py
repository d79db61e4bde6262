"""What a comparison takes a model to be is what is compiled of it."""

import pytest
from small_models import make_config

import moqc
from moqc.frontend.gate import random_model

TEXT = "It was a dark night, and the old man walked slowly towards the house. " * 12


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_moe"])
def test_sizes_are_those_of_the_artifact(model_type, tmp_path, write_tokenizer):
    """Latent attention keeps a matrix that other models quantize."""
    model, text, cache = tmp_path / "model", tmp_path / "text.txt", tmp_path / "cache"
    model.mkdir()
    random_model(make_config(model_type, vocab_size=write_tokenizer(model) + 1)).save_pretrained(model)
    text.write_text(TEXT)
    shared = {"calibration": [text], "cache": cache}
    compared = moqc.compare(
        model,
        [text],
        plans=["uniform:rtn"],
        linears="int8-g64-sym",
        window=32,
        tokens=64,
        bits=[4.8],
        **shared,
    )
    manifest = moqc.compile(model, tmp_path / "out", allocator="uniform", quantizer="rtn", bits=4.8, **shared)
    (row,) = compared.rows
    assert row.model_file_bits_per_weight == pytest.approx(
        manifest.sizes.model_file_bits_per_weight, rel=1e-9
    )
    quantized = [site for site in manifest.linear_bits if "kv_b_proj" in site]
    assert not quantized
