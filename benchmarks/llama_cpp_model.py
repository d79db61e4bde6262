"""A whole Qwen3-MoE model with random weights: moqc beside llama.cpp, end to end, on the same threads.

    pip install llama-cpp-python gguf
    python benchmarks/llama_cpp_model.py FOLDER [--layers 12] [--rounds 3] [--threads 2]

Both have the same configuration and the same formats as near as there are: experts in Q4_K (4.5 bits a
weight) and int4-g64 (4.375), other matrices in Q8_0 (8.5) and int8-g64-sym (8.25), caches of their default
type. Weights are random and routers even, so any token hits any expert. FOLDER keeps the two models for the
next run. Sides alternate, each run in a process of its own with its files in the page cache; a row is the
median of the rounds.

`first_token_s` is the time from the start of the process to the first token of a prompt of 32.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT, GENERATED, FIRST, CONTEXT = 512, 64, 32, 1024


def write_gguf(path: Path, layers: int) -> None:
    """The model for llama.cpp, a tensor at a time."""
    import gguf

    writer = gguf.GGUFWriter(path, "qwen3moe")
    c: dict[str, Any] = CONFIG
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(c["vocab_size"])
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(c["head_dim"])
    writer.add_value_length(c["head_dim"])
    writer.add_rope_freq_base(c["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_expert_count(c["num_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    tensors = list(gguf_tensors(layers))
    types = gguf.GGMLQuantizationType
    for name, shape, kind in tensors:
        quant = types[kind]
        stored = shape if kind == "F32" else gguf.quant_shape_to_byte_shape(shape, quant)
        size = int(np.prod(stored)) * (4 if kind == "F32" else 1)
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        writer.add_tensor_info(name, stored, dtype, size, None if kind == "F32" else quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    generator = np.random.default_rng(0)
    for _, shape, kind in tensors:
        writer.write_tensor_data(drawn(generator, shape, kind))
    writer.close()


def gguf_tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Name, shape [rows, columns] and type of each tensor."""
    c: dict[str, Any] = CONFIG
    hidden, width, experts = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"]
    q, kv = c["num_attention_heads"] * c["head_dim"], c["num_key_value_heads"] * c["head_dim"]
    yield "token_embd.weight", (c["vocab_size"], hidden), "Q8_0"
    yield "output_norm.weight", (hidden,), "F32"
    yield "output.weight", (c["vocab_size"], hidden), "Q8_0"
    for number in range(layers):
        at = f"blk.{number}"
        for name, shape in (("attn_norm", hidden), ("ffn_norm", hidden)):
            yield f"{at}.{name}.weight", (shape,), "F32"
        for name in ("attn_q_norm", "attn_k_norm"):
            yield f"{at}.{name}.weight", (c["head_dim"],), "F32"
        for name, rows, columns in (("q", q, hidden), ("k", kv, hidden), ("v", kv, hidden)):
            yield f"{at}.attn_{name}.weight", (rows, columns), "Q8_0"
        yield f"{at}.attn_output.weight", (hidden, q), "Q8_0"
        yield f"{at}.ffn_gate_inp.weight", (experts, hidden), "F32"
        for name in ("gate", "up"):
            yield f"{at}.ffn_{name}_exps.weight", (experts, width, hidden), "Q4_K"
        yield f"{at}.ffn_down_exps.weight", (experts, hidden, width), "Q4_K"


def drawn(generator: np.random.Generator, shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random content; scales are small, so that no sum overflows."""
    if kind == "F32":
        ones = np.ones(shape, np.float32)
        return ones if len(shape) == 1 else generator.standard_normal(shape, np.float32)
    block, size = {"Q4_K": (256, 144), "Q8_0": (32, 34)}[kind]
    count = int(np.prod(shape)) // block
    data = np.frombuffer(generator.bytes(count * size), np.uint8).reshape(count, size).copy()
    scale = np.array([2e-4], np.float16).view(np.uint8)
    data[:, :2] = scale
    if kind == "Q4_K":
        data[:, 2:4] = scale
    return data.reshape(*shape[:-1], -1)


def write_artifact(folder: Path, layers: int) -> None:
    """The model for moqc."""
    config = folder / "config.json"
    config.write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    command = ["synth", str(config), "-o", str(folder / "artifact"), "--packed", "--bits", "int4-g64"]
    arguments = [*command, "--context", str(CONTEXT), "--max-batch", "1", "--force"]
    subprocess.run([sys.executable, "-m", "moqc", *arguments], check=True)


def deny_amx() -> None:
    """Have Linux refuse tile registers to this process, so that ggml repacks matrices for AVX-512 VNNI.

    ggml's AMX code ends in a general protection fault at ``ldtilecfg`` (llama-cpp-python 0.3.36); experts do
    not use it in any case. The kernel gives no permission while a signal stack is too small for the tiles.
    """

    class Stack(ctypes.Structure):
        _fields_ = (("memory", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    deny_amx.memory = ctypes.create_string_buffer(8192)  # type: ignore[attr-defined]  # kept alive
    stack = Stack(ctypes.addressof(deny_amx.memory), 0, 8192)  # type: ignore[attr-defined]
    if ctypes.CDLL(None, use_errno=True).sigaltstack(ctypes.byref(stack), None):
        raise OSError(ctypes.get_errno(), "sigaltstack")


class LlamaCpp:
    """The model of a GGUF file."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        deny_amx()
        self._library = llama_cpp
        llama_cpp.llama_backend_init()
        log = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
        self._log = log
        model = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CONTEXT, PROMPT, PROMPT
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)

    def reset(self) -> None:
        """Forget all tokens."""
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)

    def extend(self, ids: np.ndarray) -> int:
        """Append tokens; the likeliest next one."""
        tokens = (self._library.llama_token * len(ids))(*ids.tolist())
        batch = self._library.llama_batch_get_one(tokens, len(ids))
        if self._library.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        logits = self._library.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (CONFIG["vocab_size"],)).argmax())


class Moqc:
    """The model of an artifact."""

    def __init__(self, path: Path, threads: int) -> None:
        from moqc.runtime.artifact import load
        from moqc.runtime.tvm_runtime import use_threads

        use_threads(threads)
        self._artifact = load(path)
        self.reset()

    def reset(self) -> None:
        """Forget all tokens."""
        self._session = self._artifact.session()

    def extend(self, ids: np.ndarray) -> int:
        """Append tokens; the likeliest next one."""
        return int(self._session.extend_last(ids[None])[0].argmax())


def measure(make: Callable[[Path, int], Any], path: Path, threads: int) -> dict[str, float]:
    """Tokens per second of a prompt and of generation, and when the first token was there."""
    ids = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], PROMPT, dtype=np.int64)
    model = make(path, threads)
    model.extend(ids[:FIRST])
    first = time.time()
    model.reset()
    model.extend(ids)  # all experts and buffers were touched once
    model.reset()
    start = time.perf_counter()
    token = model.extend(ids)
    prompt = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(GENERATED):
        token = model.extend(np.array([token]))
    generation = time.perf_counter() - start
    return {"first": first, "prompt_tokens_s": PROMPT / prompt, "decode_tokens_s": GENERATED / generation}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=["llama.cpp", "moqc"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    sides = {"llama.cpp": (LlamaCpp, "model.gguf"), "moqc": (Moqc, "artifact")}
    if options.side:
        make, name = sides[options.side]
        print(json.dumps(measure(make, options.folder / name, options.threads)))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if not (options.folder / "model.gguf").exists():
        write_gguf(options.folder / "draft.gguf", options.layers)
        (options.folder / "draft.gguf").rename(options.folder / "model.gguf")
    if not (options.folder / "artifact" / "moqc.json").exists():
        write_artifact(options.folder, options.layers)
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):  # the first fills the page cache
        for name in sides:
            command = [sys.executable, *sys.argv, "--side", name]
            environment = {**os.environ, "OMP_WAIT_POLICY": "active"}
            start = time.time()
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found = json.loads(done.stdout.splitlines()[-1])
            found["first_token_s"] = found.pop("first") - start
            if number:
                rows[name].append(found)
    for name, (_, file) in sides.items():
        path = options.folder / file
        size = path.stat().st_size if path.is_file() else sum(each.stat().st_size for each in path.iterdir())
        medians = {key: statistics.median(row[key] for row in rows[name]) for key in rows[name][0]}
        print(json.dumps({"provider": name, "bytes": size, **{k: round(v, 3) for k, v in medians.items()}}))


if __name__ == "__main__":
    main()
