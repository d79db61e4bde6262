"""Greedy decoding: 24 tokens from the compiled module are those of transformers' generate().

Tiny random models with the weights in float32 on both sides. The module is built as an artifact is, with
caches, and decodes one token a call after a prompt in two pieces.
"""

import numpy as np
import pytest
import torch

from moqc.frontend.gate import random_model
from moqc.frontend.hf import export, import_program
from moqc.frontend.hooks import hook
from moqc.frontend.shrink import shrink
from moqc.frontend.skeleton import build_skeleton
from moqc.frontend.survey import example_config
from moqc.ir.annotations import PARAMS

TOKENS, PROMPT = 24, 7
FAST = ("lfm2_moe",)
TYPES = (
    "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "gpt_oss",
    "glm4_moe", "granitemoe", "granitemoehybrid", "jamba", "lfm2_moe", "nemotron_h", "minimax_m2", "phimoe",
    "dots1", "ernie4_5_moe", "hunyuan_v1_moe", "flex_olmo",
)  # fmt: skip


def compiled(model, compile_and_run):
    """The module of `model`, compiled with its weights."""
    hooked = build_skeleton(model.config)
    hooked.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    hooked.tie_weights()
    hook(hooked)
    mod = import_program(export(hooked, max_batch=2, max_chunk=16), hooked)
    state = dict(hooked.named_parameters(remove_duplicate=False))
    return compile_and_run(mod, [state[name].detach().numpy() for name in PARAMS.of(mod)])


def greedy(run, prompt):
    """Tokens [B, TOKENS] that follow `prompt` [B, PROMPT]."""
    rows, cut = len(prompt), PROMPT // 2
    places = np.arange(PROMPT + TOKENS)
    run(prompt[:, :cut], np.tile(places[:cut], (rows, 1)))
    logits = run(prompt[:, cut:], np.tile(places[cut:PROMPT], (rows, 1)))
    found = [logits[:, -1].argmax(-1)]
    for place in places[PROMPT : PROMPT + TOKENS - 1]:
        logits = run(found[-1][:, None], np.full((rows, 1), place))
        found.append(logits[:, -1].argmax(-1))
    return np.stack(found, 1)


@pytest.mark.filterwarnings("ignore")  # of generate(), about its own arguments
@pytest.mark.parametrize(
    "model_type", [t if t in FAST else pytest.param(t, marks=pytest.mark.slow) for t in TYPES]
)
def test_greedy_tokens(model_type, compile_and_run):
    model = random_model(shrink(example_config(model_type)))
    prompt = np.random.default_rng(0).integers(3, model.config.vocab_size, (2, PROMPT))
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(prompt),
            attention_mask=torch.ones(prompt.shape, dtype=torch.int64),
            do_sample=False,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            use_cache=True,
            eos_token_id=-1,
            pad_token_id=0,
        )
    found = greedy(compiled(model, compile_and_run), prompt)
    np.testing.assert_array_equal(found, expected[:, PROMPT:].numpy())
