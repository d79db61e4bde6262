import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.experts import canonical
from moqc.frontend.gate import random_model

Config = Callable[..., transformers.PretrainedConfig]

ARCHITECTURES = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss")
TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"


@pytest.fixture
def model_folder(tmp_path: Path, tiny_config: Config) -> Path:
    """A small valid checkpoint in one file."""
    random_model(tiny_config("qwen3_moe")).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_come_back_as_saved(tmp_path: Path, tiny_config: Config, architecture: str) -> None:
    model = random_model(tiny_config(architecture))
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    checkpoint = Checkpoint.open(tmp_path)
    state = model.state_dict()
    assert set(checkpoint.names) == set(state)
    for name, tensor in state.items():
        assert torch.equal(checkpoint.load(name), tensor), name
        assert checkpoint.shape(name) == tuple(tensor.shape)
    for layout in checkpoint.layouts:
        for operand in layout.operands:
            name = f"{layout.site}.{operand}"
            whole = checkpoint.load(name)
            assert checkpoint.shape(name) == tuple(whole.shape)
            assert torch.equal(checkpoint.load(name, 5), whole[5])
            assert torch.equal(checkpoint.load(layout.source(operand), 5), state[layout.source(operand)][5])


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_canonical_orientation(tmp_path: Path, tiny_config: Config, architecture: str) -> None:
    """An expert computed from canonical weights equals transformers' own forward through that expert."""
    model = random_model(tiny_config(architecture))
    model.save_pretrained(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    layout = checkpoint.layouts[0]
    block = model.get_submodule(layout.site)
    x = torch.randn(3, layout.hidden, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block(x, torch.full((3, 1), 6), torch.ones(3, 1))
    gate, up, down = (canonical(layout, checkpoint, projection, 6) for projection in ("gate", "up", "down"))
    assert gate.shape == up.shape == (layout.intermediate, layout.hidden)
    bias = {
        name: canonical(layout, checkpoint, f"{name}_bias", 6) if layout.has_bias else 0.0
        for name in ("gate", "up", "down")
    }
    g, u = x @ gate.T + bias["gate"], x @ up.T + bias["up"]
    if architecture == "gpt_oss":
        hidden = g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1)
    else:
        hidden = torch.nn.functional.silu(g) * u
    torch.testing.assert_close(hidden @ down.T + bias["down"], expected, rtol=1e-5, atol=1e-5)


def test_shipped_model() -> None:
    checkpoint = Checkpoint.open(TINY_MOE)
    stored = load_file(TINY_MOE / "model.safetensors")
    assert [layout.site for layout in checkpoint.layouts] == [
        f"model.layers.{i}.mlp.experts" for i in range(4)
    ]
    assert checkpoint.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert checkpoint.load("lm_head.weight").dtype == torch.bfloat16
    assert torch.equal(checkpoint.load("lm_head.weight"), stored["model.embed_tokens.weight"])
    up = checkpoint.load("model.layers.2.mlp.experts.up", 10)
    assert torch.equal(up, stored["model.layers.2.mlp.experts.10.up_proj.weight"])


def test_fingerprint_follows_config_and_weights(model_folder: Path) -> None:
    first = Checkpoint.open(model_folder).fingerprint
    assert Checkpoint.open(model_folder).fingerprint == first
    edit_config(model_folder, rms_norm_eps=1e-5)
    second = Checkpoint.open(model_folder).fingerprint
    data = bytearray((model_folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model_folder / "model.safetensors").write_bytes(data)
    third = Checkpoint.open(model_folder).fingerprint
    assert len({first, second, third}) == 3


def test_unknown_weight_name(model_folder: Path) -> None:
    with pytest.raises(ModelError, match=r"no weight called model\.nothing"):
        Checkpoint.open(model_folder).load("model.nothing")


def test_not_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        Checkpoint.open(tmp_path)


def test_config_that_is_not_json(model_folder: Path) -> None:
    (model_folder / "config.json").write_text("{'a'")
    with pytest.raises(ModelError, match=r"config\.json: cannot read"):
        Checkpoint.open(model_folder)


@pytest.mark.parametrize("model_type", ["warp_drive", None])
def test_unknown_architecture(model_folder: Path, model_type: str | None) -> None:
    edit_config(model_folder, model_type=model_type)
    with pytest.raises(ModelError, match="cannot read this configuration of"):
        Checkpoint.open(model_folder)


def test_config_with_impossible_values(model_folder: Path) -> None:
    edit_config(model_folder, hidden_size="wide")
    with pytest.raises(ModelError, match=r"config\.json: .*hidden_size"):
        Checkpoint.open(model_folder)


def test_quantized_checkpoint(model_folder: Path) -> None:
    edit_config(model_folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(ModelError, match=r"already quantized \(gptq\).*fp8, mxfp4"):
        Checkpoint.open(model_folder)


def test_dense_model(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="qwen3: no experts blocks: the model is dense"):
        Checkpoint.open(tmp_path)


def test_missing_tensor(model_folder: Path) -> None:
    edit_weights(model_folder, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"lacks weights: model\.norm\.weight$"):
        Checkpoint.open(model_folder)


def test_missing_expert(model_folder: Path) -> None:
    edit_weights(model_folder, lambda tensors: tensors.pop("model.layers.1.mlp.experts.3.up_proj.weight"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        Checkpoint.open(model_folder)


def test_extra_tensors(model_folder: Path) -> None:
    extra = {f"model.extra.{index}": torch.zeros(1) for index in range(5)}
    edit_weights(model_folder, lambda tensors: tensors.update(extra))
    with pytest.raises(ModelError, match=r"does not use: model\.extra\.0, .*\.2 and 2 more$"):
        Checkpoint.open(model_folder)


def test_wrong_shape(model_folder: Path) -> None:
    edit_config(model_folder, vocab_size=65)
    with pytest.raises(ModelError, match=r"stored with shape \(64, 32\), config.json asks for \(65, 32\)"):
        Checkpoint.open(model_folder)


def test_wrong_dtype(model_folder: Path) -> None:
    edit_weights(model_folder, lambda t: t.update({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is stored as I32"):
        Checkpoint.open(model_folder)


def test_tied_in_config_but_stored_twice(tmp_path: Path, model_folder: Path) -> None:
    edit_config(model_folder, tie_word_embeddings=True)
    with pytest.raises(ModelError, match="two different tensors"):
        Checkpoint.open(model_folder)
    same = shutil.copytree(model_folder, tmp_path / "same")
    edit_weights(same, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert Checkpoint.open(same).tied == {"lm_head.weight": "model.embed_tokens.weight"}


def test_truncated_weights(model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="truncated"):
        Checkpoint.open(model_folder)


def test_opening_leaves_the_configuration_alone(model_folder: Path) -> None:
    checkpoint = Checkpoint.open(model_folder)
    before = checkpoint.config.to_dict()
    checkpoint.meta_model()
    assert checkpoint.config._attn_implementation != "moqc"
    assert checkpoint.config.to_dict() == before
