"""Greedy decoding: 24 tokens from the compiled artifact are those of transformers' generate().

Tiny random models, compiled in exact mode to mixed 3- and 4-bit artifacts. The model of transformers gets the
weights that the artifact stores, read from its files. Half a minute of the processor a type.
"""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moqc
from moqc.frontend.checkpoint import Checkpoint
from moqc.frontend.gate import random_model
from moqc.frontend.shrink import shrink
from moqc.frontend.survey import example_config
from moqc.manifest import read_manifest
from moqc.quant.formats import Format
from moqc.quant.pack import Packed, unpack
from moqc.runtime.sampling import Sampling
from moqc.tensorfile import open_tensors

TOKENS = 24
PROMPTS = ([17, 201, 33, 90, 5, 141, 76], [250, 9, 118])
TYPES = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "glm4_moe", "granitemoe", "granitemoehybrid", "jamba", "lfm2_moe", "nemotron_h", "minimax_m2", "phimoe",
    "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "flex_olmo",
)  # fmt: skip
TEXT = (
    "It was a dark night, and the old man walked slowly towards the house. Il était une fois, dans un port. "
    * 8
)
MARGIN = 1e-4
"""Of the two largest logits, in units of max(1, |logit|): nearer ones are a tie."""


def save_model(model_type, folder, vocabulary):
    """A checkpoint of a tiny random model with the vocabulary of the test tokenizer, and no end token."""
    config = shrink(example_config(model_type))
    config.vocab_size = vocabulary
    config.eos_token_id = None
    random_model(config).save_pretrained(folder)


def stored_weights(folder):
    """Name -> array of an artifact's files; 16-bit floats as float32."""
    tensors = {}
    for path in folder.glob("params-*.safetensors"):
        for name, stored in open_tensors(path).items():
            tensors[name] = np.empty(
                stored.data.shape, np.float32 if stored.dtype == "BF16" else stored.data.dtype
            )
            stored.copy_to(tensors[name])
    return tensors


def matrix(tensors, prefix, fmt, rows, columns):
    """A packed matrix, or a stack of them, dequantized."""
    parts = (tensors.get(f"{prefix}.{part}") for part in ("codes", "scales", "zeros"))
    return unpack(Packed(*parts), Format.parse(fmt), rows, columns).dequantize()


def operand(tensors, layout, name, formats):
    """An experts operand of all experts, as the artifact stores it."""
    if name.endswith("_bias"):
        return torch.from_numpy(tensors[f"{layout.site}.{name}"])
    _, rows, columns = layout.shape(name)
    places = tensors[f"{layout.site}.table"][("gate", "up", "down").index(name)]
    return torch.stack([
        matrix(tensors, f"{layout.site}.{name}.{number}", fmt, rows, columns)[index]
        for fmt, (number, index) in zip(formats[name], places, strict=True)
    ])  # fmt: skip


def dequantized(model, folder):
    """transformers' model of `model`, with every weight that the artifact in `folder` stores."""
    checkpoint, manifest, tensors = Checkpoint.open(model), read_manifest(folder), stored_weights(folder)
    eager = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    weights = eager.state_dict()
    for name in weights.keys() & tensors.keys():
        weights[name].copy_(torch.from_numpy(tensors[name]))
    for site, fmt in manifest.linear_bits.items():
        weights[f"{site}.weight"].copy_(matrix(tensors, site, fmt, *checkpoint.shape(f"{site}.weight")))
    for layout in checkpoint.layouts:
        for name in layout.operands:
            stored = weights[layout.source(name)]
            places = layout.take(torch.arange(stored.numel()).reshape(stored.shape), name)
            found = operand(tensors, layout, name, manifest.bits[layout.site])
            stored.view(-1)[places.reshape(-1)] = found.reshape(-1)
    return eager.eval()


def assert_cache_holds_latents(config, cache):
    """Of latent attention: a token costs every layer the latent and the rotated key, not every head's."""
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        stored = sum(math.prod(shape) for shape in cache.tensors) // (cache.batch * cache.context)
        assert stored == config.num_hidden_layers * (rank + config.qk_rope_head_dim)


def expected_tokens(eager, prompt):
    """What generate() makes of one prompt: tokens, and the margin by which each was chosen."""
    made = eager.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, use_cache=True, pad_token_id=0,
        eos_token_id=-1, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(made.logits)[:, 0].topk(2).values
    margins = (best[:, 0] - best[:, 1]) / best[:, 0].abs().clamp(min=1)
    return made.sequences[0, len(prompt) :].tolist(), margins.tolist()


@pytest.mark.filterwarnings("ignore")  # of generate(), about its own arguments
@pytest.mark.slow
@pytest.mark.parametrize("model_type", TYPES)
def test_greedy_tokens(model_type, tmp_path, write_tokenizer):
    model, out, text = tmp_path / "model", tmp_path / "artifact", tmp_path / "text.txt"
    model.mkdir()
    save_model(model_type, model, write_tokenizer(model) + 1)
    text.write_text(TEXT)
    moqc.compile(
        model, out, bits=3.5, allocator="frequency", quantizer="rtn", activations="float", context=64,
        calibration=[text], calibration_tokens=512, cache=tmp_path / "cache",
    )  # fmt: skip
    manifest, artifact = read_manifest(out), moqc.load(out)
    used = {fmt for site in manifest.bits.values() for formats in site.values() for fmt in formats}
    assert len(used) > 1, "several bit classes"
    assert manifest.linear_bits
    assert_cache_holds_latents(shrink(example_config(model_type)), manifest.cache)
    eager = dequantized(model, out)
    for prompt in PROMPTS:
        expected, margins = expected_tokens(eager, prompt)
        found = list(artifact.tokens(prompt, Sampling(), max_tokens=TOKENS))
        wrong = next((at for at in range(TOKENS) if found[at : at + 1] != expected[at : at + 1]), None)
        assert wrong is None or (margins[wrong] < MARGIN and wrong > TOKENS // 2), (found, expected, margins)
