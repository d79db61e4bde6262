"""Float8 and MXFP4 checkpoints: the same numbers as transformers' own dequantization."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.coded import decode_float8, decode_mxfp4
from moqc.frontend.gate import random_model

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}


def declare(folder, coding):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": coding}))


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def to_float8(tensors):
    """Every projection of the layers as DeepSeek stores it."""
    for name in [name for name in tensors if ".layers." in name and name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        scales = torch.rand(-(-rows // 16), -(-columns // 16)) * 0.01 + 0.001
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales


def to_mxfp4(tensors):
    """Every experts matrix as gpt-oss stores it, with random codes."""
    generator = torch.Generator().manual_seed(0)
    for name in [
        name for name in tensors if name.endswith("experts.gate_up_proj") or name.endswith("down_proj")
    ]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(118, 126, shape, generator=generator, dtype=torch.uint8)


@pytest.fixture
def deepseek(tmp_path, tiny_config):
    """hidden 32, and matrices of 16, 20 and 48 rows: blocks of 16 that fit, and one that does not."""
    random_model(tiny_config("deepseek_v3")).to(torch.bfloat16).save_pretrained(tmp_path)
    edit(tmp_path, to_float8)
    declare(tmp_path, FP8)
    return tmp_path


@pytest.fixture
def gpt_oss(tmp_path, tiny_config):
    config = tiny_config("gpt_oss", hidden_size=64, intermediate_size=96)
    random_model(config).to(torch.bfloat16).save_pretrained(tmp_path)
    edit(tmp_path, to_mxfp4)
    declare(tmp_path, MXFP4)
    return tmp_path


def test_float8_values_are_those_of_transformers():
    values = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    for scales in (torch.rand(3, 4, 3), torch.randint(120, 130, (3, 4, 3), dtype=torch.uint8)):
        expected = Fp8Dequantize(None)._dequantize_one(values, scales, torch.bfloat16)
        assert torch.equal(decode_float8(values, scales, (16, 32)), expected)


def test_float8_short_blocks():
    """576 rows in blocks of 128, as kv_a_proj_with_mqa of DeepSeek-V3; transformers refuses these."""
    values, scales = torch.randn(40, 50).to(torch.float8_e4m3fn), torch.rand(3, 4)
    decoded = decode_float8(values, scales, (16, 16))
    for row, column in ((0, 0), (15, 15), (16, 47), (39, 49)):
        expected = values[row, column].float() * scales[row // 16, column // 16]
        assert decoded[row, column] == expected.to(torch.bfloat16)


def test_mxfp4_values_are_those_of_transformers():
    blocks = torch.randint(0, 256, (3, 40, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 40, 5), dtype=torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert torch.equal(decode_mxfp4(blocks, scales), expected)
    assert torch.equal(decode_mxfp4(blocks[1], scales[1]), expected[1])


def test_mxfp4_checkpoint(gpt_oss):
    checkpoint = Checkpoint.open(gpt_oss)
    tensors = load_file(gpt_oss / "model.safetensors")
    for layer in range(2):
        site = f"model.layers.{layer}.mlp.experts"
        fused = {
            name: convert_moe_packed_tensors(
                tensors[f"{site}.{name}_blocks"], tensors[f"{site}.{name}_scales"]
            )
            for name in ("gate_up_proj", "down_proj")
        }
        assert torch.equal(checkpoint.load(f"{site}.gate_up_proj"), fused["gate_up_proj"])
        assert torch.equal(checkpoint.load(f"{site}.down_proj", 3), fused["down_proj"][3])
        assert torch.equal(checkpoint.load(f"{site}.up"), fused["gate_up_proj"][..., 1::2].transpose(1, 2))
        assert torch.equal(checkpoint.load(f"{site}.gate", 5), fused["gate_up_proj"][5, :, ::2].T)
    assert not hasattr(checkpoint.config, "quantization_config")
    assert checkpoint.meta_model().config.model_type == "gpt_oss"


def test_float8_checkpoint(deepseek):
    checkpoint = Checkpoint.open(deepseek)
    tensors = load_file(deepseek / "model.safetensors")
    stored = "model.layers.1.mlp.experts.{}.{}_proj.weight"
    for projection in ("gate", "up", "down"):
        names = [stored.format(expert, projection) for expert in range(8)]
        expected = torch.stack(
            [
                Fp8Dequantize(None)._dequantize_one(tensors[n], tensors[f"{n}_scale_inv"], torch.bfloat16)
                for n in names
            ]
        )
        assert torch.equal(checkpoint.load(f"model.layers.1.mlp.experts.{projection}"), expected)
        assert torch.equal(checkpoint.load(f"model.layers.1.mlp.experts.{projection}", 6), expected[6])
    plain = "model.layers.0.input_layernorm.weight"
    assert torch.equal(checkpoint.load(plain), tensors[plain])
    ragged = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[ragged].shape[0] % 16
    assert checkpoint.load(ragged).dtype == torch.bfloat16


def test_whole_model_is_what_transformers_loads(gpt_oss):
    quantization = transformers.Mxfp4Config(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gpt_oss, dtype=torch.bfloat16, quantization_config=quantization
    )
    checkpoint = Checkpoint.open(gpt_oss)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.load(name), tensor), name


NAME = "model.layers.0.self_attn.o_proj.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}_scale_inv"), "o_proj.weight has no .*o_proj.weight_scale_inv"),
        (lambda t: t.update({f"{NAME}_scale_inv": torch.ones(2, 3)}), r"blocks of 16 x 16 .* need \[2, 2\]"),
        (lambda t: t[f"{NAME}_scale_inv"].fill_(torch.nan), "holds NaN"),
        (lambda t: t.update({f"{NAME}_scale": torch.ones(2, 2)}), "tensors the model does not use"),
    ],
)
def test_damaged_float8(deepseek, change, message):
    edit(deepseek, change)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(deepseek).load(NAME)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{BLOCKS}_scales"), "down_proj_blocks has no .*down_proj_scales"),
        (lambda t: t.pop(f"{BLOCKS}_blocks"), "tensors the model does not use: .*down_proj_scales"),
        (lambda t: t.update({f"{BLOCKS}_scales": t[f"{BLOCKS}_scales"][:, 1:].clone()}), r"MXFP4 needs U8"),
        (lambda t: t[f"{BLOCKS}_scales"].fill_(255), "holds NaN or infinity"),
    ],
)
def test_damaged_mxfp4(gpt_oss, change, message):
    edit(gpt_oss, change)
    with pytest.raises(ModelError, match=message):
        Checkpoint.open(gpt_oss).load(BLOCKS)


def test_block_size_that_is_none(deepseek):
    declare(deepseek, {**FP8, "weight_block_size": [16]})
    with pytest.raises(ModelError, match="weight_block_size"):
        Checkpoint.open(deepseek)
