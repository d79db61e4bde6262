import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from moqc.errors import ModelError
from moqc.frontend.gate import TOLERANCE, Comparison, Verdict, in_pieces, random_model, verify_architecture

Config = Callable[..., transformers.PretrainedConfig]
Compile = Callable[..., Callable[..., Any]]

# One layer where one shows all there is.
LAYERS = {"qwen3_moe": 1, "olmoe": 1, "mixtral": 1, "deepseek_v3": 2, "gpt_oss": 2}


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3_moe",
        "deepseek_v3",
        pytest.param("olmoe", marks=pytest.mark.slow),
        pytest.param("mixtral", marks=pytest.mark.slow),
        pytest.param("gpt_oss", marks=pytest.mark.slow),
    ],
)
def test_supported(tmp_path: Path, tiny_config: Config, compile_and_run: Compile, architecture: str) -> None:
    config = tiny_config(architecture, num_hidden_layers=LAYERS[architecture])
    verdict = verify_architecture(config, tmp_path, compile_and_run, "llvm")
    assert verdict.model_type == architecture
    assert verdict.experts_blocks == (1 if architecture == "deepseek_v3" else LAYERS[architecture])
    assert verdict.attention_blocks == LAYERS[architecture]
    assert set(verdict.errors) == {"hooked", "exported", "compiled", "decoded"}
    assert 0 < max(verdict.errors.values()) <= TOLERANCE / 5
    (file,) = (tmp_path / "gate").iterdir()
    assert Verdict(**json.loads(file.read_text())) == verdict

    def never(*_arguments: Any) -> Any:
        raise AssertionError("a cached verdict was measured again")

    assert verify_architecture(config, tmp_path, never, "llvm") == verdict


@pytest.mark.slow
def test_window_in_the_mask_only_is_recovered(
    tmp_path: Path, tiny_config: Config, compile_and_run: Compile
) -> None:
    config = tiny_config("phimoe", num_local_experts=8, sliding_window=4, num_hidden_layers=1)
    verdict = verify_architecture(config, tmp_path, compile_and_run, "llvm")
    assert max(verdict.errors.values()) <= TOLERANCE / 5


CONV = {
    "num_experts": 8,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "layer_types": ["conv"],
    "num_dense_layers": 0,
    "conv_L_cache": 3,
}


def test_convolutions_keep_their_state(tmp_path: Path, tiny_config: Config, compile_and_run: Compile) -> None:
    verdict = verify_architecture(tiny_config("lfm2_moe", **CONV), tmp_path, compile_and_run, "llvm")
    assert (verdict.attention_blocks, verdict.recurrent_blocks) == (0, 1)
    assert verdict.errors["decoded"] <= TOLERANCE / 5


@pytest.fixture
def eager(tiny_config: Config) -> transformers.PreTrainedModel:
    return random_model(tiny_config("qwen3_moe"))


def run_eagerly(model: transformers.PreTrainedModel) -> Callable[..., Any]:
    def run(ids: Any, positions: Any) -> Any:
        with torch.no_grad():
            tensors = {
                "input_ids": torch.from_numpy(ids),
                "position_ids": torch.from_numpy(positions).clamp(0),
            }
            return model(**tensors).logits.numpy()

    return run


def test_wrong_experts_are_noticed(eager: transformers.PreTrainedModel) -> None:
    """Negative control: one projection of two experts swapped."""
    comparison = Comparison(eager)
    comparison.check("compiled", run_eagerly(eager))
    down = eager.get_parameter("model.layers.1.mlp.experts.down_proj")
    with torch.no_grad():
        down[:2] = down[[1, 0]]
    with pytest.raises(ModelError, match="qwen3_moe: refused: the compiled model computes something else"):
        comparison.check("compiled", run_eagerly(eager))


def test_lost_state_is_refused(eager: transformers.PreTrainedModel) -> None:
    """A model that forgets the pieces before: right on whole sequences, wrong in pieces."""
    comparison = Comparison(eager)
    run = run_eagerly(eager)
    comparison.check("compiled", run)
    with pytest.raises(
        ModelError, match=r"qwen3_moe: refused: it mixes tokens .* that moqc keeps no state for"
    ):
        comparison.check("decoded", in_pieces(run))


def test_not_a_number_is_refused(eager: transformers.PreTrainedModel) -> None:
    with pytest.raises(ModelError, match="relative error nan"):
        Comparison(eager).check("compiled", lambda ids, _: np.full((*ids.shape, 64), np.nan, np.float32))


def test_failure_at_run_time_names_the_stage(eager: transformers.PreTrainedModel) -> None:
    def fails(_ids: Any, _positions: Any) -> Any:
        raise RuntimeError("kernel fell over")

    with pytest.raises(ModelError, match="qwen3_moe: exported model fails: RuntimeError: kernel fell over"):
        Comparison(eager).check("exported", fails)


def test_dense_model_is_refused(tmp_path: Path, compile_and_run: Compile) -> None:
    with pytest.raises(ModelError, match="qwen3: no experts blocks"):
        verify_architecture(transformers.Qwen3Config(), tmp_path, compile_and_run, "llvm")


def test_unknown_tensor_is_refused(
    tmp_path: Path, tiny_config: Config, compile_and_run: Compile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that hands attention a tensor moqc has never heard of."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

    original = Qwen3MoeAttention.forward

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        return original(self, *arguments, **keywords, alibi=torch.zeros(4))

    monkeypatch.setattr(Qwen3MoeAttention, "forward", forward)
    with pytest.raises(ModelError, match="uses alibi, which moqc does not model"):
        verify_architecture(tiny_config("qwen3_moe"), tmp_path, compile_and_run, "llvm")
