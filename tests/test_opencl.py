"""The OpenCL target on whatever device there is (PoCL in CI): `pytest -m opencl`.

In float16 where that device has it, as Intel's runtime for CPUs has (docs/targets.md).
"""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tvm

import moqc
from moqc.launches import read_launches
from moqc.runtime.opencl import OpenCl
from moqc.synthesis import synthesize_artifact

pytestmark = pytest.mark.opencl
TOLERANCES = {"float32": 2e-3, "float16": 2e-2}
"""Relative error of logits against the CPU's, by what the device's kernels multiply in."""

QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 300,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 80,
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "moe_intermediate_size": 200,
    "max_position_embeddings": 200,
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
"""Sizes that no tile divides: 48 and 200 columns, heads of 80, rows of 200."""
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 200,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"],
    "eos_token_id": 1,
    "dtype": "bfloat16",
}
"""Biases, sinks, a window, a clamped activation."""


@pytest.fixture(scope="module")
def tolerance():
    return TOLERANCES[OpenCl().precision]


def artifacts(folder, config, experts, linears):
    """The same random weights, compiled for this CPU and for OpenCL."""
    (folder / "config.json").write_text(json.dumps(config))
    loaded = []
    for target in ("native", "opencl"):
        synthesize_artifact(
            folder / "config.json",
            folder / target,
            experts=experts,
            linears=linears,
            activations="float",
            target=target,
            context=None,
            max_batch=2,
            layers=None,
            seed=3,
            cache=folder / "cache",
            force=False,
        )
        loaded.append(moqc.load(folder / target))
    return loaded


@pytest.mark.parametrize(
    ("config", "experts", "linears"),
    [
        (QWEN, ("int1-g32:1", "int2-g64:1", "int3-g128:1", "int4-g32-sym:1", "int8-g64:1"), "int8-g64-sym"),
        (QWEN, ("int3-g64-sym-s8:1", "int2-g32-s8:1", "int8-g128-sym:1"), "int4-g32"),
        (GPT_OSS, ("int4-g64:1", "int3-g32-s8:1"), "int3-g32-sym"),
    ],
    ids=["bits", "byte-scales", "gpt-oss"],
)
def test_logits_agree_with_the_cpu(tmp_path, tolerance, config, experts, linears):
    cpu, gpu = artifacts(tmp_path, config, experts, linears)
    generator = np.random.default_rng(0)
    for rows, tokens in ((1, 1), (2, 1), (1, 5), (2, 45), (1, 130)):
        ids = generator.integers(2, 300, (rows, tokens))
        expected, found = cpu.forward(ids), gpu.forward(ids)
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error < tolerance, (rows, tokens, error)


def test_decoding_continues_a_prefill(tmp_path, tolerance):
    cpu, gpu = artifacts(tmp_path, QWEN, ("int2-g64:3", "int4-g64:1"), "int8-g64-sym")
    ids = np.random.default_rng(1).integers(2, 300, (2, 70))
    expected, session = cpu.forward(ids), gpu.session()
    parts = [session.extend(part) for part in np.split(ids, [64, 65, 66, 69], axis=1)]
    found = np.concatenate(parts, axis=1)
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_tiny_moe_compiles_and_says_what_the_cpu_says(tmp_path, tolerance):
    # GPTQ: down is rotated.
    plan = {"bits": 3.0, "allocator": "uniform", "calibration_tokens": 2048, "max_batch": 1}
    for target in ("native", "opencl-mali"):
        moqc.compile(
            "examples/models/tiny-moe", tmp_path / target, target=target, activations="float", **plan
        )
    cpu, gpu = (moqc.load(tmp_path / target) for target in ("native", "opencl-mali"))
    parameters = [(tmp_path / name / "params-00001.safetensors") for name in ("native", "opencl-mali")]
    assert parameters[0].read_bytes() == parameters[1].read_bytes()  # one download serves both
    launches = read_launches(tmp_path / "opencl-mali")
    assert not (tmp_path / "opencl-mali" / "model.so").exists()
    assert all("__kernel" in kernel.source for kernel in launches.kernels.values())
    ids = gpu.tokenizer.encode("The history of the city begins")
    assert np.linalg.norm(gpu.forward(ids) - cpu.forward(ids)) < tolerance * np.linalg.norm(cpu.forward(ids))
    prompt = "The history of the city begins"
    assert gpu.generate(prompt, max_tokens=32) == cpu.generate(prompt, max_tokens=32)


def test_the_loader_in_c_plus_plus_says_what_python_says(tmp_path):
    """Takes `apt install cmake opencl-c-headers ocl-icd-opencl-dev`."""
    options = {"bits": 3.0, "allocator": "uniform", "quantizer": "rtn", "max_batch": 1, "context": 96}
    moqc.compile("examples/models/tiny-moe", tmp_path / "model", target="opencl", **options)
    site, build = Path(tvm.__file__).parents[1], tmp_path / "build"
    configure = ["cmake", "-S", "examples/deploy/cpp", "-B", build, f"-DSITE={site}", "-DOPENCL=ON"]
    for command in (configure, ["cmake", "--build", build]):
        subprocess.run(command, check=True, capture_output=True)
    model = moqc.load(tmp_path / "model")
    for prompt in ("The history of the city begins", "Il était"):
        words = ["--prompt", prompt, "--max-tokens", "16", "--logits", tmp_path / "logits"]
        command = [build / "moqc-run", tmp_path / "model", *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.removesuffix("\n") == model.generate(prompt, max_tokens=16, temperature=0.0)
        found = np.fromfile(tmp_path / "logits", np.float32)[: model.manifest.vocabulary]
        np.testing.assert_allclose(found, model.forward(model.encode(prompt))[-1], rtol=1e-5, atol=1e-5)
