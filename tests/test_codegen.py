"""A small model through the whole lowering: in memory, and as a library in a process without the compiler."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from moqc import codegen
from moqc.errors import TargetError
from moqc.ir.annotations import CACHE
from moqc.ir.text import parse_module
from moqc.passes.base import PassContext
from moqc.passes.legalize import Legalize
from moqc.passes.plan_cache import PlanCache
from moqc.passes.schedule import Schedule
from moqc.quant import reference
from moqc.targets import TARGETS, find_target

VOCABULARY, HIDDEN, HEADS, KEY_HEADS, WIDTH, EXPERTS, INNER = 40, 32, 4, 2, 8, 5, 24

MODEL = """
batch = TypeVar("batch")
seq = TypeVar("seq")
@I.ir_module
class Module:
    I.module_attrs({"moqc.schema": 1, "moqc.params": [
        "embed", "norm", "q", "k", "v", "o", "router", "gate", "up", "down"]})
    @R.function
    def main(
        input_ids: R.Tensor((batch, seq), "int64"),
        positions: R.Tensor((batch, seq), "int64"),
        embed: R.Tensor((40, 32), "float32"),
        norm: R.Tensor((32,), "float32"),
        q: R.Tensor((32, 32), "float32"),
        k: R.Tensor((16, 32), "float32"),
        v: R.Tensor((16, 32), "float32"),
        o: R.Tensor((32, 32), "float32"),
        router: R.Tensor((5, 32), "float32"),
        gate: R.Tensor((5, 24, 32), "float32"),
        up: R.Tensor((5, 24, 32), "float32"),
        down: R.Tensor((5, 32, 24), "float32"),
    ):
        R.func_attr({"tir_var_upper_bound": {"batch": 2, "seq": 16}})
        with R.dataflow():
            x = R.take(embed, input_ids, axis=0)
            square = R.power(x, R.const(2.0, "float32"))
            mean = R.mean(square, axis=[-1], keepdims=True)
            shifted = R.add(mean, R.const(1e-6, "float32"))
            root = R.rsqrt(shifted)
            scaled = R.multiply(x, root)
            normed = R.multiply(norm, scaled)
            q_t = R.permute_dims(q)
            q_flat = R.matmul(normed, q_t)
            q_heads = R.reshape(q_flat, R.shape([batch, seq, 4, 8]))
            q_states = R.permute_dims(q_heads, axes=[0, 2, 1, 3])
            k_t = R.permute_dims(k)
            k_flat = R.matmul(normed, k_t)
            k_heads = R.reshape(k_flat, R.shape([batch, seq, 2, 8]))
            k_states = R.permute_dims(k_heads, axes=[0, 2, 1, 3])
            v_t = R.permute_dims(v)
            v_flat = R.matmul(normed, v_t)
            v_heads = R.reshape(v_flat, R.shape([batch, seq, 2, 8]))
            v_states = R.permute_dims(v_heads, axes=[0, 2, 1, 3])
            mixed = R.moqc.attention(q_states, k_states, v_states, positions, causal=1, operands=[],
                scale="0.35", site="attention", softcap="0.0", window=0)
            merged = R.reshape(mixed, R.shape([batch, seq, 32]))
            o_t = R.permute_dims(o)
            projected = R.matmul(merged, o_t)
            h = R.add(x, projected)
            flat = R.reshape(h, R.shape([batch * seq, 32]))
            router_t = R.permute_dims(router)
            scores = R.matmul(flat, router_t)
            probabilities = R.nn.softmax(scores)
            top = R.topk(probabilities, k=2, ret_type="both", dtype="int64")
            weights = top[0]
            ids = top[1]
            y = R.moqc.experts(flat, ids, weights, gate, up, down,
                site="experts", activation="silu_glu", operands=["gate", "up", "down"])
            y_rows = R.reshape(y, R.shape([batch, seq, 32]))
            out = R.add(h, y_rows)
            embed_t = R.permute_dims(embed)
            logits = R.matmul(out, embed_t)
            R.output(logits)
        return logits
"""

RUN = """
import json, sys
import numpy as np
sys.modules["torch"] = None
import tvm
from tvm.runtime import vm
folder = sys.argv[1]
machine = vm.VirtualMachine(tvm.runtime.load_module(folder + "/model.so"), tvm.cpu())
data = np.load(folder + "/data.npz")
weights = [tvm.runtime.tensor(data[f"w{i}"]) for i in range(10)]
caches = [tvm.runtime.tensor(np.zeros(shape, np.float32)) for shape in json.loads(sys.argv[2])]
pieces = []
for start, stop in [(0, 5), (5, 6), (6, 12)]:
    ids, positions = (tvm.runtime.tensor(data[name][:, start:stop].copy()) for name in ("ids", "positions"))
    pieces.append(machine["main"](ids, positions, weights, caches)[0].numpy())
np.save(folder + "/logits.npy", np.concatenate(pieces, axis=1))
"""


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(0)
    shapes = [
        (VOCABULARY, HIDDEN), (HIDDEN,), (HEADS * WIDTH, HIDDEN), (KEY_HEADS * WIDTH, HIDDEN),
        (KEY_HEADS * WIDTH, HIDDEN), (HIDDEN, HEADS * WIDTH), (EXPERTS, HIDDEN), (EXPERTS, INNER, HIDDEN),
        (EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER),
    ]  # fmt: skip
    return [torch.randn(shape, generator=generator) / shape[-1] ** 0.25 for shape in shapes]


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(1)
    positions = np.stack([np.arange(12), np.where(np.arange(12) < 7, np.arange(12), -1)])
    return random.integers(0, VOCABULARY, (2, 12)), positions


def forward(weights, ids, positions):
    """The model in torch. ids, positions [B,S] -> logits [B,S,V]."""
    embed, norm, q, k, v, o, router, gate, up, down = weights
    x = embed[torch.from_numpy(ids)]
    normed = norm * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    batch, tokens = ids.shape
    states = [
        (normed @ w.T).view(batch, tokens, -1, WIDTH).transpose(1, 2).repeat_interleave(copies, 1)
        for w, copies in ((q, 1), (k, 2), (v, 2))
    ]
    at = torch.from_numpy(positions)
    seen = (at[:, None, None, :] <= at[:, None, :, None]) & (at >= 0)[:, None, None, :]
    mixed = torch.nn.functional.scaled_dot_product_attention(*states, attn_mask=seen, scale=0.35)
    h = (x + mixed.transpose(1, 2).reshape(batch, tokens, -1) @ o.T).view(-1, HIDDEN)
    top = torch.topk((h @ router.T).softmax(-1), 2)
    y = reference.experts(h, top.indices, top.values, gate, up, down, activation="silu_glu")
    return ((h + y) @ embed.T).view(batch, tokens, -1).numpy()


def check(logits, weights, inputs):
    """Compare where there is a token."""
    real = inputs[1] >= 0
    np.testing.assert_allclose(logits[real], forward(weights, *inputs)[real], rtol=1e-4, atol=1e-4)


def test_compile_and_run(weights, inputs):
    target = find_target("native")
    run = codegen.compile_and_run(parse_module(MODEL), [w.numpy() for w in weights], target)
    check(run(*inputs), weights, inputs)
    ids, positions = inputs
    # Another batch and another length through the same code.
    check(run(ids[:1, :3], positions[:1, :3]), weights, (ids[:1, :3], positions[:1, :3]))


def test_library_runs_without_the_compiler(weights, inputs, tmp_path):
    ctx = PassContext(target=find_target("native"))
    mod = PlanCache(context=12, batch=2, dtype="float32")(parse_module(MODEL), ctx)
    executable = codegen.build(Schedule()(Legalize()(mod, ctx), ctx), ctx.target)
    codegen.export(executable, tmp_path / "model.so", ctx.target)
    arrays = {f"w{i}": w.numpy() for i, w in enumerate(weights)}
    np.savez(tmp_path / "data.npz", ids=inputs[0], positions=inputs[1], **arrays)
    shapes = json.dumps(CACHE.of(mod)["tensors"])
    command = [sys.executable, "-c", RUN, str(tmp_path), shapes]
    subprocess.run(command, check=True, env={"TVM_USE_RUNTIME_LIB": "1", "PATH": "/usr/bin"}, timeout=60)
    check(np.load(tmp_path / "logits.npy"), weights, inputs)


def test_export_without_a_linker(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(TargetError, match="apt install gcc"):
        codegen.export(None, Path("model.so"), find_target("native"))


def test_avx2_gives_the_same(weights, inputs):
    run = codegen.compile_and_run(parse_module(MODEL), [w.numpy() for w in weights], TARGETS["x86-64-v3"])
    check(run(*inputs), weights, inputs)


def test_a_function_that_the_runtime_lacks_is_refused():
    mod = parse_module(MODEL.replace("R.nn.softmax(scores)", "R.sort(scores)"))
    ctx = PassContext(target=find_target("native"))
    mod = Schedule()(Legalize()(mod, ctx), ctx)
    with pytest.raises(TargetError, match=r"tvm\.contrib\.sort\.sort"):
        codegen.build(mod, ctx.target)


def test_weights_of_another_shape_are_an_error(weights, inputs):
    arrays = [w.numpy() for w in weights]
    arrays[1] = arrays[1][:-1]
    run = codegen.compile_and_run(parse_module(MODEL), arrays, find_target("native"))
    with pytest.raises((ValueError, TypeError, RuntimeError), match=r"weight|shape"):
        run(*inputs)
