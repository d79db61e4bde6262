"""`moqc synth`: checkpoints as transformers writes them, artifacts whose kernels agree with the reference."""

import json

import numpy as np
import pytest
import torch
import transformers

import moqc
from moqc import synthesis
from moqc.errors import PipelineError, UserError
from moqc.frontend.checkpoint import Checkpoint
from moqc.synthesis import synthesize_artifact, synthesize_checkpoint

TINY = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "moe_intermediate_size": 40,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
ARTIFACT = {
    "experts": ("int2-g64:3", "int4-g64:1"),
    "linears": "int8-g64-sym",
    "activations": "float",
    "target": "native",
    "context": None,
    "max_batch": 2,
    "layers": None,
    "seed": 3,
    "force": False,
}


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(TINY))
    return file


def test_checkpoint_is_what_transformers_reads(tmp_path, config, monkeypatch):
    monkeypatch.setattr(synthesis, "SHARD_BYTES", 60_000)
    synthesize_checkpoint(config, tmp_path / "model", layers=None, seed=1)
    files = sorted(path.name for path in tmp_path.glob("model/*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert "model.layers.1.mlp.experts.7.down_proj.weight" in index["weight_map"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    checkpoint = Checkpoint.open(tmp_path / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.load(name), tensor)
    with pytest.raises(UserError, match="holds files that are not a moqc artifact"):
        synthesize_checkpoint(config, tmp_path / "model", layers=None, seed=1)


def test_artifact_runs_and_is_certified(tmp_path, config):
    manifest = synthesize_artifact(config, tmp_path / "out", cache=tmp_path / "cache", **ARTIFACT)
    assert manifest.source.path == f"{config}, random weights with seed 3"
    for projections in manifest.bits.values():
        assert {name: sorted(formats) for name, formats in projections.items()} == dict.fromkeys(
            ("gate", "up", "down"), ["int2-g64"] * 6 + ["int4-g64"] * 2
        )
    assert any("experts" in kernel for kernel in manifest.numerics)
    assert all(found.max_relative_error < 1e-5 for found in manifest.numerics.values())
    artifact = moqc.load(tmp_path / "out")
    logits = artifact.forward(np.arange(20)[None])
    assert np.isfinite(logits).all()
    assert 0.01 < logits.std() < 10
    assert artifact.generate("abc", max_tokens=4)
    # Everything is drawn: another seed gives other weights, the same one the same.
    again = synthesize_artifact(config, tmp_path / "again", cache=tmp_path / "cache", **ARTIFACT)
    assert again.files["params-00001.safetensors"] == manifest.files["params-00001.safetensors"]


def test_caches_in_other_dtypes_give_the_same_logits_but_for_rounding(tmp_path, config):
    logits, tokens = {}, np.random.default_rng(0).integers(3, 200, (2, 40))
    for dtype, columns in (("float32", 8), ("float16", 8), ("int8", 10)):
        options = {**ARTIFACT, "kv_cache": dtype}
        manifest = synthesize_artifact(config, tmp_path / dtype, cache=tmp_path / "cache", **options)
        assert manifest.cache.buffers[0] == ((2, 2, 64, columns), dtype)
        session = moqc.load(tmp_path / dtype).session()
        logits[dtype] = np.concatenate([session.extend(part) for part in np.split(tokens, [30], 1)], axis=1)
    size = np.linalg.norm(logits["float32"])
    assert 0 < np.linalg.norm(logits["float16"] - logits["float32"]) < 1e-3 * size
    assert 0 < np.linalg.norm(logits["int8"] - logits["float32"]) < 2e-2 * size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache": "int4"}, "kv-cache 'int4': the kernels of target .* have float16, int8, float32"),
        ({"target": "cuda", "activations": None, "kv_cache": "int8"}, "of target cuda have float16"),
        ({"experts": ("int2-g64:x",)}, "'int2-g64:x': expected a format"),
        ({"experts": ("int2-g64", "int2-g64")}, "each once"),
        ({"experts": ()}, "no format for the experts"),
        ({"linears": "int9"}, "unknown format"),
        ({"activations": "int4"}, "have int8, float"),
        ({"max_batch": 0}, "must be at least 1"),
        ({"context": 65}, "must be 1 to 64 for this model"),
        ({"layers": 9}, "has 2 layers"),
    ],
)
def test_wrong_options(tmp_path, config, changes, message):
    with pytest.raises((UserError, PipelineError), match=message):
        synthesize_artifact(config, tmp_path / "out", cache=tmp_path, **{**ARTIFACT, **changes})
    assert not (tmp_path / "out").exists()
