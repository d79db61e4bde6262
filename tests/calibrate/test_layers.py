from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moqc.calibrate.layers import LayeredModel
from moqc.calibrate.stream import computed, split_batches
from moqc.errors import ModelError
from moqc.frontend.checkpoint import Checkpoint
from moqc.quant import reference

TINY_MOE = Path(__file__).parents[2] / "examples" / "models" / "tiny-moe"
ARCHITECTURES = ("qwen3_moe", "olmoe", "mixtral", "deepseek_v3", "gpt_oss")


def logits_of(model: LayeredModel, tokens: Tensor, **options: Any) -> Tensor:
    batches = split_batches(tokens, 3 * tokens.shape[1])  # ragged: 3, 3 and 2 windows
    return torch.cat(list(model.logits(model.forward(batches, **options))))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_transformers(small: Any, tokens: Tensor, architecture: str) -> None:
    reference_model = small(architecture)
    expected = reference_model.logits(tokens)
    found = logits_of(LayeredModel(reference_model.checkpoint), tokens)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_logits_of_the_trained_model() -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY_MOE, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.randint(0, 16384, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
    found = logits_of(LayeredModel(Checkpoint.open(TINY_MOE)), tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_sites_by_layer_skip_dense_layers(small: Any) -> None:
    model = LayeredModel(small("deepseek_v3").checkpoint)
    assert model.layer_count == 2
    assert [model.sites(0), model.sites(1)] == [[], ["model.layers.1.mlp.experts"]]


def test_experts_function_sees_the_inputs_of_the_block(small: Any, tokens: Tensor) -> None:
    reference_model = small("mixtral")
    expected = reference_model.expert_inputs(tokens)
    model = LayeredModel(reference_model.checkpoint)
    stream = model.start([tokens])
    for index in range(model.layer_count):
        original, calls = model.original_experts(index), []
        with model.layer(index) as layer:
            layer.run(
                stream, lambda call, calls=calls: calls.append(call) or torch.zeros_like(call.x), keep=False
            )
            layer.run(stream, original)
        [call] = calls
        x, ids, weights = expected[call.site]
        assert torch.equal(call.ids, ids)
        torch.testing.assert_close(call.x, x, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(call.weights, weights, rtol=1e-4, atol=1e-6)


def test_substituted_experts_change_the_model(small: Any, tokens: Tensor) -> None:
    reference_model = small()
    model = LayeredModel(reference_model.checkpoint)
    blocks = {site: model.experts(site) for site in model.layouts}
    changed = {site: block.substitute(down=block.down * 1.5) for site, block in blocks.items()}
    found = logits_of(model, tokens, experts=computed(changed))
    for module in reference_model.model.modules():
        if hasattr(module, "down_proj") and hasattr(module, "has_gate"):
            module.down_proj.data *= 1.5
    torch.testing.assert_close(found, reference_model.logits(tokens), rtol=1e-5, atol=1e-4)


class QuantizedInput(nn.Module):
    """A linear whose input is quantized: what activations="int8" means for a substituted weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(reference.fake_quantize_activations(x), self.weight)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_substituted_linears(small: Any, tokens: Tensor, activations: Any) -> None:
    reference_model = small()
    name = "model.layers.1.self_attn.q_proj"
    weight = reference_model.checkpoint.load(f"{name}.weight").float().round(decimals=1)
    model = LayeredModel(
        reference_model.checkpoint,
        override=lambda asked: weight if asked == f"{name}.weight" else None,
        activations=activations,
    )
    found = logits_of(model, tokens)
    module = reference_model.model.get_submodule("model.layers.1.self_attn")
    unchanged = reference_model.logits(tokens)
    if activations == "int8":
        module.q_proj = QuantizedInput(weight)
    else:
        module.q_proj.weight.data = weight
    expected = reference_model.logits(tokens)
    assert float((expected - unchanged).abs().max()) > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_weights_are_freed_after_use(small: Any, tokens: Tensor) -> None:
    model = LayeredModel(small().checkpoint)
    logits_of(model, tokens)
    left = [name for name, tensor in model._model.named_parameters() if not tensor.is_meta]
    left += [
        name
        for layer in model._real_layers
        for name, tensor in layer.named_parameters()
        if not tensor.is_meta
    ]
    assert left == []


def test_a_layer_that_returns_a_tuple_is_refused(
    small: Any, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = LayeredModel(small().checkpoint)
    stream = model.start([tokens])
    with model.layer(0) as layer:
        forward: Callable[..., Any] = layer.module.forward
        monkeypatch.setattr(layer.module, "forward", lambda *a, **k: (forward(*a, **k),))
        with pytest.raises(ModelError, match="returns tuple"):
            layer.run(stream, model.original_experts(0))
