"""`moqc export-onnx`: what onnxruntime computes from the file, against the artifact and the reference."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moqc
from moqc.calibrate.forward import reference_forward
from moqc.calibrate.quantize import quantize_experts
from moqc.calibrate.workspace import Workspace
from moqc.errors import ModelError, UserError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.gate import random_model
from moqc.onnx_export import export_onnx

COMMON = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 256,
}
CONFIGS = {
    "qwen3_moe": {"num_experts": 4, "norm_topk_prob": True, "tie_word_embeddings": True},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 4},
}
TOKENS = np.random.default_rng(0).integers(0, 256, (3, 11))
LOWERING = (
    "allocate-bits{{bits=8.9 allocator=uniform formats={}}},"
    "quantize-experts{{quantizer=rtn activations=float}},"
    "quantize-linears{{activations=float}},plan-cache{{context=64 dtype=float32}},legalize,schedule"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_tokenizer):
    """Model type -> folder of a tiny checkpoint; experts of 64 and 96 columns."""
    made = {}

    def make(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            write_tokenizer(made[kind])
            random_model(CONFIG_MAPPING[kind](**COMMON, **CONFIGS[kind])).save_pretrained(made[kind])
        return made[kind]

    return make


def run_ort(folder, tokens):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    positions = np.tile(np.arange(tokens.shape[1]), (len(tokens), 1))
    return session.run(["logits"], {"input_ids": tokens, "positions": positions})[0]


def difference(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("kind", CONFIGS)
def test_model_equals_the_reference_with_the_same_weights(model, tmp_path, kind):
    """Sinks, windows, biases, a clamped activation, shared key heads and tied embeddings included."""
    checkpoint = Checkpoint.open(model(kind))
    export_onnx(model(kind), tmp_path / "onnx", uniform=None)
    plan = {
        layout.site: dict.fromkeys(layout.projections, ["int4-g64-sym"] * layout.experts)
        for layout in checkpoint.layouts
    }
    store = quantize_experts(checkpoint, plan, "rtn", None, Workspace(tmp_path / "cache"))
    for tokens in (TOKENS, TOKENS[:1, :1]):
        expected = torch.cat(list(reference_forward(checkpoint, torch.from_numpy(tokens), store))).numpy()
        assert difference(run_ort(tmp_path / "onnx", tokens), expected) < 1e-4
    proto = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    nodes = [node for node in proto.graph.node if node.op_type == "QMoE"]
    assert [node.name for node in nodes] == [layout.site for layout in checkpoint.layouts]
    assert {entry.domain for entry in proto.opset_import} == {"", "com.microsoft"}
    assert "site-packages" not in str(proto)
    assert (tmp_path / "onnx" / "tokenizer.json").is_file()


@pytest.mark.parametrize("formats", ["int4-g64-sym", "int2-g32-sym", "int3-g64-sym"])
def test_artifact_keeps_its_codes(model, tmp_path, formats):
    """Asymmetric codes become 8 bits, where onnxruntime rounds activations: see test_qmoe.py."""
    moqc.compile(
        model("qwen3_moe"), tmp_path / "out", pipeline=LOWERING.format(formats), cache=tmp_path / "cache"
    )
    export_onnx(tmp_path / "out", tmp_path / "onnx", uniform=None)
    expected = moqc.load(tmp_path / "out").forward(TOKENS)
    assert difference(run_ort(tmp_path / "onnx", TOKENS), expected) < 1e-4


def test_rotated_experts_are_turned_back(model, tmp_path):
    rotating = LOWERING.format("int4-g64-sym").replace("quantizer=rtn", "quantizer=rtn rotate=true")
    moqc.compile(model("qwen3_moe"), tmp_path / "out", pipeline=rotating, cache=tmp_path / "cache")
    with pytest.raises(ModelError, match=r"down is stored for rotated inputs, which QMoE has not"):
        export_onnx(tmp_path / "out", tmp_path / "onnx", uniform=None)
    export_onnx(tmp_path / "out", tmp_path / "onnx", uniform="int8-g64-sym")
    expected = moqc.load(tmp_path / "out").forward(TOKENS)
    assert difference(run_ort(tmp_path / "onnx", TOKENS), expected) < 0.05  # rounded once more, to 8 bits


def test_formats_without_a_form(model, tmp_path):
    moqc.compile(
        model("qwen3_moe"), tmp_path / "out", pipeline=LOWERING.format("int3-g64"), cache=tmp_path / "cache"
    )
    with pytest.raises(ModelError, match=r"int3-g64 has no form in QMoE: export with --uniform int4-g64-sym"):
        export_onnx(tmp_path / "out", tmp_path / "onnx", uniform=None)
    assert not (tmp_path / "onnx").exists()
    export_onnx(tmp_path / "out", tmp_path / "onnx", uniform="int4-g64-sym")
    exact = moqc.load(tmp_path / "out").forward(TOKENS)
    assert 1e-3 < difference(run_ort(tmp_path / "onnx", TOKENS), exact) < 0.8
    with pytest.raises(UserError, match="holds files that are not a moqc artifact"):
        export_onnx(tmp_path / "out", tmp_path / "onnx", uniform="int4-g64-sym")
