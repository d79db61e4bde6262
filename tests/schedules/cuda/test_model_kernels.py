"""Linears, attention and the rest of a model: what they build to where there is no GPU, and refusals."""

from __future__ import annotations

import shutil

import pytest
import tvm
from tvm import relax

from moqc.errors import TargetError, UserError
from moqc.ir import ops
from moqc.quant.formats import Format
from moqc.schedules.cuda.attention import AttentionShape, attention_function
from moqc.schedules.cuda.dense import embedding_function, rms_norm_function, top_k_function
from moqc.schedules.cuda.linear import LinearShape, linear_function
from moqc.schedules.cuda.lower import lower_mixed_experts
from moqc.schedules.cuda.toolchain import prepare
from moqc.targets import find_target

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="compiles CUDA code: needs nvcc")


@needs_nvcc
def test_builds_without_a_gpu(tmp_path):
    """Several linears in a launch, ragged sizes, all options of attention: machine code, not source."""
    linears = [
        LinearShape(Format.parse("int8-g64-sym"), 100, 264, 2, bias=True),
        LinearShape(Format.parse("int3-g64"), 48, 264, 2),
        LinearShape(Format.parse("int1-g128-s8"), 48, 264, 2),
        LinearShape(Format.parse("tcq3-g32"), 48, 264, 2),
    ]
    shape = AttentionShape(8, 2, 64, 32, 0.2, window=70, softcap=5.0, sinks=True, normed=True, rotary=64)
    functions = {
        "linear": linear_function(linears),
        "attention": attention_function(shape, slots=2, context=512),
        "norm": rms_norm_function(200, 1e-6, weighted=True, lead=2, added=True),
        "top": top_k_function(60, 4, "int64", lead=1, softmax=True, normalize=True),
        "rows": embedding_function(Format.parse("int8-g64-sym"), 264, dtype="int64", lead=2),
        "values": embedding_function(Format.parse("tcq2-g64"), 264, dtype="int64", lead=2),
    }
    target = find_target("cuda")
    prepare(target.architectures)
    machine = tvm.target.Target(target.tvm)
    mod = tvm.IRModule({name: each.with_attr("global_symbol", name) for name, each in functions.items()})
    with machine:
        library = tvm.tirx.build(mod, target=machine)
    library.export_library(str(tmp_path / "kernels.so"))
    binary = (tmp_path / "kernels.so").read_bytes()
    assert b"sm_90" in binary
    assert b"__global__" not in binary


def test_refuses_what_it_has_no_kernels_for():
    with pytest.raises(UserError, match="columns in eights"):
        LinearShape(Format(4), 64, 100, 1)
    with pytest.raises(UserError, match="no format int6-g64"):
        linear_function([LinearShape(Format(6, 64), 64, 128, 1)])
    with pytest.raises(UserError, match="multiples of 16 up to 256"):
        AttentionShape(4, 4, 40, 64, 0.1)


@pytest.mark.parametrize(
    ("activation", "mode", "options", "says"),
    [
        ("silu", "int8", {}, "take float activations"),
        ("silu|hadamard32", "float", {}, "no CUDA kernel rotates"),
        ("silu", "float", {"hidden": 32}, "no CUDA kernel has protected channels"),
    ],
)
def test_refuses_modes_it_has_no_kernels_for(activation, mode, options, says):
    arguments = [relax.Var(name, relax.TensorType([1, 1], "float32")) for name in ("x", "ids", "w", "table")]
    call = ops.mixed_experts(
        *arguments,
        site="s",
        activation=activation,
        activations=mode,
        operands=["table"],
        classes=["up:int4-g64", "down:int4-g64"],
        intermediate=64,
        **options,
    )
    with pytest.raises(TargetError, match=says):
        lower_mixed_experts(relax.BlockBuilder(), call, find_target("cuda"))


def test_targets_are_parsed():
    target = find_target("cuda:sm_90+sm_80@x86-64-v4")
    assert target.architectures == ("sm_80", "sm_90")
    assert target.name == "cuda:sm_80+sm_90@x86-64-v4"
    assert target.tvm["host"] == {"kind": "llvm", "mcpu": "x86-64-v4"}
    assert target.tvm["max_shared_memory_per_block"] == 163 * 1024
    assert find_target("cuda").architectures == ("sm_90",)
    for name, message in (
        ("cuda:sm_10", "unknown architecture 'sm_10'"),
        ("cuda@z80", "unknown host 'z80'"),
        ("cuda:sm_90@", "expected for example"),
    ):
        with pytest.raises(TargetError, match=message):
            find_target(name)
    with pytest.raises(TargetError, match="the kernels of target cuda have float"):
        find_target("cuda").mode("int8")
    assert find_target("cuda").mode(None) == "float"
